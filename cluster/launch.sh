#!/bin/bash
# One node's part of a training: torchrun over its GPUs, a log for each process, and an exit code that a scheduler can act on.
#   bash cluster/launch.sh sft_train.py --config configs/sft_llama3.2-3b.yaml --resume
#   NODES=2 NODE_RANK=0 HEAD=node-0 GPUS=8 bash cluster/launch.sh sft_train.py --config configs/sft_llama3.2-3b.yaml --resume
# The same line on every node, with its own NODE_RANK; HEAD is the host of node 0, and run_dir lies on a disk that all share.
# Exit codes: 0 finished; 75 stopped early, start it again; 2 the settings are wrong; 1 look at the logs.

set -u
NODES=${NODES:-1} NODE_RANK=${NODE_RANK:-0} HEAD=${HEAD:-localhost} PORT=${PORT:-29500}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

# A container's first process gets a signal alone, so it is handed on. Slurm signals every process by itself.
stopped='' child=''
trap 'stopped=yes; [ -z "$child" ] || kill -s USR1 "$child"' USR1 TERM INT

# Wrong settings end here, with their own lines, before any process waits for another.
settings=$(python "$@" --print-config)
code=$?
[ -z "$stopped" ] || exit 75
[ "$code" -eq 0 ] || exit "$code"
run_dir=$(sed -n 's/^run_dir: //p' <<<"$settings")

logs=${LOGS:-$(dirname "$run_dir")/logs}/$(basename "$run_dir")/node-$NODE_RANK
# torchrun kills its processes 30 seconds after it has handed on a signal, which is short for a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}
python "$(dirname "$0")/torchrun.py" --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" --master_addr "$HEAD" \
    --master_port "$PORT" --signals-to-handle SIGHUP,SIGQUIT --log-dir "$logs" --redirects 3 --tee 0:3 "$@" &
child=$!
wait "$child"
code=$?
# wait ends when a signal comes, so it is asked again.
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done

# torchrun ends with 1 whatever its processes ended with. The manifest knows better, unless the stop came before there was one.
if [ "$code" -ne 0 ] && { [ -n "$stopped" ] || grep -q '"exit": "interrupted' "$run_dir/manifest.json"; }; then
    exit 75
fi
exit "$code"

#!/bin/bash
# One node's part of a training: torchrun over its GPUs, a log for each process, and an exit code that a scheduler can act on.
#   bash cluster/launch.sh sft_train.py --config configs/sft_llama3.2-3b.yaml --resume
#   NODES=2 NODE_RANK=0 HEAD=node-0 GPUS=8 bash cluster/launch.sh sft_train.py --config configs/sft_llama3.2-3b.yaml --resume
# The same line on every node, with its own NODE_RANK; HEAD is the host of node 0, and run_dir lies on a disk that all share.
# Exit codes: 0 finished; 75 stopped early, start it again; 2 the settings are wrong; 1 look at the logs.

set -u
NODES=${NODES:-1} NODE_RANK=${NODE_RANK:-0} HEAD=${HEAD:-localhost} PORT=${PORT:-29500}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

# Wrong settings end here, with their own lines, before any process waits for another.
settings=$(python "$@" --print-config) || exit $?
run_dir=$(sed -n 's/^run_dir: //p' <<<"$settings")

logs=${LOGS:-$(dirname "$run_dir")/logs}/$(basename "$run_dir")/node-$NODE_RANK
# torchrun hands on only the signals that it is told to, and kills its processes 30 seconds later, which is short for a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}
torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" --master_addr "$HEAD" --master_port "$PORT" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --log-dir "$logs" --redirects 3 --tee 0:3 "$@" &
child=$!
# A container's first process gets the signal alone. wait ends when one comes, so it is asked again.
trap 'kill -s USR1 "$child"' USR1 TERM INT
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done

# torchrun ends with 1 whatever its processes ended with; the manifest knows better.
if [ "$code" -ne 0 ] && grep -q '"exit": "interrupted' "$run_dir/manifest.json"; then
    exit 75
fi
exit "$code"

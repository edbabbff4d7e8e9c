#!/bin/bash
# Slurm: nodes of eight GPUs, requeued until the run is finished.
#   sbatch cluster/slurm.sh sft_train.py --config configs/sft_llama3.2-3b.yaml
#SBATCH --job-name=posttrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

# The files lie where sbatch was called: Slurm runs a copy of this one.
cd "$SLURM_SUBMIT_DIR" || exit 2
source .venv/bin/activate

export NODES=$SLURM_JOB_NUM_NODES GPUS=$SLURM_GPUS_ON_NODE
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD
# A port of the job's own, for two jobs may share a node.
export PORT=$((20000 + SLURM_JOB_ID % 20000))

# --resume is right for the first start, too. NODE_RANK is each task's own.
srun bash -c 'NODE_RANK=$SLURM_NODEID exec bash cluster/launch.sh "$@" --resume' launch "$@"
code=$?
# A preemption is requeued by Slurm itself; this is for the end of --time.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

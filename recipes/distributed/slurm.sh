#!/usr/bin/env bash
# Two nodes of eight devices under SLURM, one task a device. srun says who is who: no other launcher is needed.
#   sbatch recipes/distributed/slurm.sh MODEL TRAIN.jsonl
# The folder it is started in is one that all nodes see.
#SBATCH --job-name=surgery
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

model=${1:?usage: sbatch slurm.sh MODEL TRAIN.jsonl}
data=${2:?usage: sbatch slurm.sh MODEL TRAIN.jsonl}
adapter=${ADAPTER:-adapter}

# In the batch script's own shell, once. After a requeue the adapter is there, and training goes on from its checkpoint.
[ -d "$adapter" ] || surgery apply "$model" -o "$adapter" -r 64

# A task that fails ends the others. SIGTERM, two minutes before the time is up, saves a checkpoint.
srun --kill-on-bad-exit=1 surgery train "$adapter" --data "$data" --resume auto \
    strategy=fsdp2 batch_size=2 gradient_checkpointing=true learning_rate=1e-3 max_length=2048

surgery export "$adapter" --merge -o "$adapter-merged" --no-verify
surgery verify "$adapter-merged" --no-numeric

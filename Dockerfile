# megatron_smlp on NVIDIA's PyTorch image, whose torch, Transformer Engine and Apex are built for each other.
#
#   docker build -t megatron_smlp .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
#     -v "$PWD/data:/workspace/data" -v "$PWD/runs:/workspace/runs" megatron_smlp \
#     torchrun --nproc-per-node 8 pretrain_smlp.py --config configs/paper/regular/smlp_deterministic.yaml \
#     --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 ...
#
# Several nodes, Slurm, and what `make first-gpu` does, in a container: docs/gpus.md.
# The default is the image that Megatron-Core 0.19 is developed on.
ARG IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${IMAGE}

WORKDIR /workspace
COPY setup.py pyproject.toml README.md LICENSE pretrain_smlp.py ./
COPY megatron_smlp megatron_smlp
COPY configs configs
COPY plugins plugins
COPY examples examples
COPY tools tools

# What was built against the image's torch stays with it. Anything else may be replaced: the image's own constraints
# (PIP_CONSTRAINT) would pin every package.
RUN python -m pip list --format freeze \
    | grep -iE '^(torch|triton|pytorch-triton|transformer[-_]engine|apex|flash[-_]attn)[^=]*==' > /tmp/built.txt \
    && PIP_CONSTRAINT=/tmp/built.txt python -m pip install --no-cache-dir '.[eval,fast-tokenizer,muon,parquet,plots,serve,study]'

# A build that would not start fails here.
RUN python -c 'import torch; assert torch.version.cuda, torch.__version__' \
    && smlp-pretrain --version \
    && smlp-estimate --config configs/cpu/smlp_deterministic.yaml --vocab-size 50257

"""Convert a checkpoint to another format: one process, no GPU, no Transformer Engine.

python tools/convert_checkpoint.py --load RUN --save FOLDER --from torch_dist --to hf
"""

import argparse

from megatron_smlp.errors import readable_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", required=True, help="the --save folder of a run")
    parser.add_argument("--save", required=True, help="folder to write")
    parser.add_argument("--from", dest="source", choices=["torch_dist"], default="torch_dist")
    parser.add_argument("--to", dest="target", choices=["hf"], default="hf")
    parser.add_argument("--tokenizer-model", help="Hugging Face tokenizer folder to put beside it")
    options = parser.parse_args()

    from megatron_smlp.conversion.huggingface import export

    with readable_errors("convert_checkpoint.py"):
        folder = export(options.load, options.save, tokenizer=options.tokenizer_model)
        print(f"{folder}: written")


if __name__ == "__main__":
    main()

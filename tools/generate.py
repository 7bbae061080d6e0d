"""Continue a prompt with an exported model, by transformers' own `generate`.

python tools/generate.py --hf FOLDER --prompt "The file" --max-new-tokens 60 --seed 1
"""

import argparse

from megatron_smlp.errors import UsageError, readable_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", required=True, help="folder that tools/convert_checkpoint.py wrote")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to add at most")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, default=50, help="tokens to choose among")
    parser.add_argument("--seed", type=int, default=0)
    with readable_errors("generate.py"):
        print(generate(parser.parse_args()))


def generate(options: argparse.Namespace) -> str:
    """Prompt and continuation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # it wonders about a model type that it does not ship
    tokenizer = AutoTokenizer.from_pretrained(options.hf, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.hf, trust_remote_code=True).eval()
    inputs = tokenizer(options.prompt, return_tensors="pt", add_special_tokens=False)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("--prompt is empty: give some text to continue")
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    if room < 1:
        raise UsageError(
            f"--prompt has {inputs['input_ids'].shape[1]} tokens and the model's sequences end at "
            f"{model.config.max_position_embeddings}: give a shorter one"
        )
    set_seed(options.seed)
    sampling = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=min(options.max_new_tokens, room), **sampling
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()

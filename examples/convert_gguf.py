"""Converts a GGUF file of a Llama-architecture model into a Hugging Face directory.

    python -m examples.convert_gguf --gguf=SmolLM2-135M-Instruct.Q4_1.gguf --out=smollm2

The package `gguf` reads the file and dequantizes its tensors (`pip install gguf`, or this project
with the extra [hf]). The directory holds config.json, generation_config.json, model.safetensors,
tokenizer.json and, where the file has a chat template, tokenizer_config.json.
"""

from absl import flags

from examples import cli
from examples.llama import from_gguf

GGUF = flags.DEFINE_string("gguf", None, "The file to convert. Required.", required=True)
OUT = flags.DEFINE_string("out", None, "Directory to write. Required.", required=True)
DTYPE = flags.DEFINE_enum(
    "dtype", "float16", ["float32", "bfloat16", "float16"], "Type of the stored weights."
)


def main(_):
    from_gguf.convert(GGUF.value, OUT.value, DTYPE.value)
    print(f"written: {OUT.value}")


if __name__ == "__main__":
    cli.run(main)

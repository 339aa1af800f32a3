"""Save a compressed model, load it as transformers loads any, and export it for other runtimes.

It needs the extra `bert`; with `onnx` it writes ONNX files too, in float32 and in 8 bits. The model
is a small BERT with random weights: nothing is downloaded.
"""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModel, BertConfig, BertModel, logging

import kroneckerbert as kb

logging.disable_progress_bar()
torch.manual_seed(0)
config = BertConfig(
    hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024
)
teacher = BertModel(config).eval()
student = kb.compress(teacher, "kronecker-bert-8")
ids = torch.randint(config.vocab_size, (2, 16))
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def size(folder: Path) -> str:
    return f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB"


with TemporaryDirectory() as name, torch.no_grad():
    folder = Path(name)
    expected = student(ids).last_hidden_state

    # Saved as safetensors; `import kroneckerbert` told the Auto classes of it.
    teacher.save_pretrained(folder / "teacher")
    student.save_pretrained(folder / "student")
    print("saved:", size(folder / "teacher"), "to", size(folder / "student"))
    loaded = AutoModel.from_pretrained(folder / "student")
    assert torch.equal(loaded(ids).last_hidden_state, expected)

    # The dense model of the same function, for tools that know only that.
    dense = kb.decompress(student)
    print("dense again:", type(dense).__name__, f"{dense.num_parameters():,} parameters")
    torch.testing.assert_close(dense(ids).last_hidden_state, expected, rtol=1e-3, atol=1e-4)

    # A program of stock operators, loaded and run against PyTorch before it is kept.
    ways = [{"format": "torch_export"}]
    if all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime")):
        ways += [{"format": "onnx"}, {"format": "onnx", "quantize": "int8-dynamic"}]
    for way in ways:
        result = kb.export(student, folder / "_".join(way.values()), sample=inputs, **way)
        print(result)
        # For these inputs, of any batch and length; a .pt2 runs code when it is loaded.
        program = kb.load_exported(result.folder, trust_remote_code=True)
        assert program(**inputs).last_hidden_state.shape == expected.shape

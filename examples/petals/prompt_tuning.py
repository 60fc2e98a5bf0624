"""Tune a prompt, as programs for Petals do: a causal language model, then a classifier. Only the import is slowllm's.

python examples/petals/prompt_tuning.py MODEL MADDR TUNING_MODE
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, get_scheduler, set_seed

from slowllm.swarm.petals import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)

model_name, peer, tuning_mode = sys.argv[1:4]
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.padding_side = "right"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
options = {
    "initial_peers": [peer],
    "pre_seq_len": 4,
    "tuning_mode": tuning_mode,
    "torch_dtype": torch.float32,
}


def train(model, rows, num_epochs, make_inputs):
    """Train what wants a gradient, and print the loss of each step."""
    model.config.pad_token_id = tokenizer.pad_token_id
    batches = DataLoader(rows, shuffle=True, batch_size=2, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    steps = num_epochs * len(batches)
    scheduler = get_scheduler("linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=steps)
    for _ in range(num_epochs):
        model.train()
        for batch in batches:
            loss = model(**make_inputs(batch)).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            print(f"{loss.item():.4f}")
    model.eval()


model = AutoDistributedModelForCausalLM.from_pretrained(model_name, **options)
sentence = tokenizer("The cat sat on the mat", return_tensors="pt")["input_ids"]
train(model, [sentence[0]] * 4, 3, lambda batch: {"input_ids": batch, "labels": batch})
print(tokenizer.decode(model.generate(sentence[:, :2], max_new_tokens=4)[0]))
model.close()

model = AutoDistributedModelForSequenceClassification.from_pretrained(model_name, num_labels=2, **options)
print(*(name for name, parameter in model.named_parameters() if parameter.requires_grad))
reviews = [("a fine film", 1), ("a dull film", 0), ("fine, fine", 1), ("dull, dull", 0)]


def encode(batch):
    """Return the model's inputs for texts and labels."""
    texts, labels = batch
    encoded = tokenizer(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False)
    return {"input_ids": encoded["input_ids"], "labels": labels}


train(model, reviews, 10, encode)

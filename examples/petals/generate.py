"""Continue a text and chat, as programs for Petals do. Only the import is slowllm's.

python examples/petals/generate.py MODEL MADDR
"""

import sys

import torch
from transformers import AutoTokenizer

from slowllm.swarm.petals import AutoDistributedModelForCausalLM

model_name, peer = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoDistributedModelForCausalLM.from_pretrained(
    model_name, initial_peers=[peer], torch_dtype=torch.float32
)

# A text is continued.
inputs = tokenizer("A cat sat", return_tensors="pt")["input_ids"]
outputs = model.generate(inputs, max_new_tokens=5)
print(tokenizer.decode(outputs[0]))

# A session is continued token by token, and by further texts.
with model.inference_session(max_length=48) as session:
    text = tokenizer("The value is", return_tensors="pt")["input_ids"]
    for _ in range(4):
        new = model.generate(text, max_new_tokens=1, session=session)
        print(tokenizer.decode(new[0, -1:]), end="", flush=True)
        text = None  # go on
    print()
    answer = model.generate(tokenizer(" and then", return_tensors="pt")["input_ids"], max_new_tokens=3)
    print(tokenizer.decode(answer[0]))

# Hidden states are looked at, and a loop of one's own is written.
with model.transformer.h.inference_session(max_length=16) as session, torch.inference_mode():
    tokens = tokenizer("A cat", return_tensors="pt")["input_ids"]
    found = []
    while len(found) < 4:
        hidden = model.transformer.word_embeddings(tokens)
        hidden = model.transformer.word_embeddings_layernorm(hidden)
        hidden = session.step(hidden)
        logits = model.lm_head(model.transformer.ln_f(hidden[:, -1]))
        tokens = logits.argmax(-1)[:, None]
        found.append(int(tokens))
    print(tokenizer.decode(found))

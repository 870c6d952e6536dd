"""Full fine-tuning of the same model: a mean over tokens, dropout and a linear layer on top.

AdamW with weight decay 0.01, batches of 32 texts in a random order, gradients clipped to norm 1,
a linear warm-up over the first tenth of the steps and a linear decay to zero, three epochs. The
learning rate is chosen by accuracy on validation texts.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

LEARNING_RATES = (1e-4, 3e-4)
EPOCHS = 3
BATCH = 32  # texts
MAX_LENGTH = 512  # tokens
WARM_UP = 0.1  # of the steps


class Classifier(torch.nn.Module):
    """The whole model with a head, all of it trainable."""

    def __init__(self, model, n_classes):
        super().__init__()
        self.body = AutoModel.from_pretrained(model, dtype=torch.float32)
        self.dropout = torch.nn.Dropout(0.1)
        self.head = torch.nn.Linear(self.body.config.hidden_size, n_classes)

    def forward(self, batch):
        hidden = self.body(**batch).last_hidden_state  # (n_texts, n_tokens, width)
        mask = batch["attention_mask"].unsqueeze(-1)  # (n_texts, n_tokens, 1)
        return self.head(self.dropout((hidden * mask).sum(1) / mask.sum(1)))


class Batches:
    """Texts as padded batches of tokens."""

    def __init__(self, model, texts):
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.ids = self.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]

    def of(self, order):
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            ids = {"input_ids": [self.ids[i] for i in rows]}
            yield rows, self.tokenizer.pad(ids, return_tensors="pt")


def train(model, texts, y, n_classes, learning_rate):
    """Train for the given epochs, the same way every time."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    classifier = Classifier(model, n_classes).train()
    batches = Batches(model, texts)
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=learning_rate, weight_decay=0.01, fused=True
    )
    n_steps = EPOCHS * -(-len(texts) // BATCH)

    def rate(step):
        done = (step + 1) / n_steps
        return min(done / WARM_UP, (1 - done) / (1 - WARM_UP))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    labels = torch.tensor(y)
    for _ in range(EPOCHS):
        for rows, batch in batches.of(rng.permutation(len(texts))):
            loss = torch.nn.functional.cross_entropy(classifier(batch), labels[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return classifier.eval()


def accuracy(classifier, model, texts, y):
    """Score a trained model on texts, the longest first so that batches hold little padding."""
    batches = Batches(model, texts)
    order = sorted(range(len(texts)), key=lambda i: -len(batches.ids[i]))
    right = 0
    with torch.inference_mode():
        for rows, batch in batches.of(order):
            right += int((classifier(batch).argmax(1).numpy() == y[rows]).sum())
    return right / len(texts)


def measure_fine_tuning(splits, model):
    """Choose the learning rate, train on training and validation texts together, and test once."""
    n_classes = len(np.unique(splits.y))
    training, validation = splits.part(validation=False), splits.part(validation=True)
    scores = {
        lr: accuracy(train(model, *training, n_classes, lr), model, *validation)
        for lr in LEARNING_RATES
    }
    best = max(scores, key=scores.get)
    classifier = train(model, splits.texts, splits.y, n_classes, best)
    yield {
        "set": splits.name,
        "method": "fine-tuning of the whole model",
        "columns": classifier.head.in_features,
        "validation": scores[best],
        "test": accuracy(classifier, model, splits.test, splits.y_test),
        "chosen": {"learning rate": best},
    }

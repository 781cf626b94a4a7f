"""Make the tokenizer and the text encoder of the tiny model.

The tokenizer is a sentencepiece model over captions and plain English. The T5 encoder learns to restore captions with
masked words: at every position it predicts the word. Its embeddings therefore distinguish every concept, including
concepts that are not in the transformer's training data, like the embeddings of the real T5.
"""

from __future__ import annotations

import io
import json
import math
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

from cogflow.data.shapes import COLOURS, GROUNDS, MOTIONS, SHAPES, Scene
from cogflow.models.tiny import SPEC, new_text_encoder

PLAIN = (
    "a video of the {w} in front of {v}; an animal, a person and two cars; day and night; slow and fast; "
    "big, small, old, new; water, sky, tree, house, street, hand, face, cat, dog, bird, ball; "
    "walks runs jumps turns falls spins grows shrinks; white black gray brown; "
    "inside outside near far above below; camera zoom pan close wide shot; on with at by from to into"
)
WORDS = [word for word in PLAIN.replace(";", "").replace(",", "").split() if "{" not in word]


def all_captions() -> list[str]:
    """Return every caption that drawn clips can have."""
    return [Scene(c, s, m, g, 0).caption for c in COLOURS for s in SHAPES for m in MOTIONS for g in GROUNDS]


def make_tokenizer(folder: Path) -> Any:
    """Build and save the tokenizer (ids 0 pad, 1 end, 2 unknown, as T5's), and return it as ``AutoTokenizer`` loads it.

    A unigram model of all printable characters, in which each word of the captions and of :data:`PLAIN` is a piece. The
    pieces are set and not learned, because training on such a small vocabulary yields fragments instead of words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    characters = string.ascii_letters + string.digits + string.punctuation
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(characters)] * 4),
        model_writer=trained,
        model_type="char",
        vocab_size=len(characters) + 4,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = ModelProto()
    model.ParseFromString(trained.getvalue())
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    for piece in model.pieces[3:]:
        piece.score = -10.0
    known = {piece.piece for piece in model.pieces}
    for word in sorted({word for text in all_captions() for word in text.split()} | set(WORDS)):
        if "\u2581" + word not in known:
            model.pieces.add(piece="\u2581" + word, score=-8.0)
    model.trainer_spec.vocab_size = len(model.pieces)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "additional_special_tokens": [],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_text_encoder(
    tokenizer: Any, steps: int, seed: int, log: Callable[[dict[str, str | float]], None]
) -> T5EncoderModel:
    """Train a T5 encoder to restore masked captions and return it. It takes a minute on a CPU and is not resumed."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 7])
    encoder = new_text_encoder(len(tokenizer))
    head = nn.Linear(SPEC.text_width, len(tokenizer))
    known = all_captions()
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-3)
    unknown = tokenizer.unk_token_id
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        texts = [known[i] for i in rng.integers(0, len(known), 48)]
        texts += [" ".join(rng.choice(WORDS, rng.integers(2, 10))) for _ in range(14)] + ["", ""]
        ids = tokenizer(
            texts, padding="max_length", max_length=SPEC.text_tokens, truncation=True, return_tensors="pt"
        ).input_ids
        masked = ids.masked_fill(torch.from_numpy(rng.random(ids.shape) < 0.15) & (ids > 2), unknown)
        logits = head(encoder(masked)[0])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step + 1 == steps:
            seen = (logits.argmax(-1) == ids)[(masked == ids) & (ids > 2)].float().mean()
            log({"part": "text", "step": step, "loss": loss.item(), "accuracy": seen.item()})
    return encoder.eval().requires_grad_(False)

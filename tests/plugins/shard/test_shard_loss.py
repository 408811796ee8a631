"""The loss of many positions at once, against logits of one position at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edged_plugins.shard._loss import IGNORED, Loss
from edged_plugins.shard._random import Shape, write_model
from shard_rig import running, specs_of

from edged import EngineError, Step


def test_rows_beyond_learned_positions_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "gpt2.gguf")
    write_model(path, Shape("gpt2", kv_heads=4, is_tied=True, has_fused_qkv=True), "F32", seed=2)
    with running(specs_of(path, [(1,)], numerics="exact")) as (engine,):
        most = engine._model.context_tokens
        Loss(engine._shard, most).close()
        with pytest.raises(EngineError, match=f"max_length of at most {most}"):
            Loss(engine._shard, most + 1)


def test_a_loss_is_the_sum_over_logits_of_single_steps(random_model: str) -> None:
    with running(specs_of(random_model, [(1,)], numerics="exact")) as (engine,):
        vocab, tokens = engine._model.vocab, 9
        ids = np.random.default_rng(3).integers(0, vocab, (2, tokens))
        labels = ids.copy()
        labels[0, :4] = IGNORED
        labels[1, 6:] = IGNORED
        wanted = 0.0
        for sequence, (row, scored) in enumerate(zip(ids, labels, strict=True)):
            for t in range(tokens - 1):
                logits = engine.logits(Step(sequence, (int(row[t]),), t, None)).astype(np.float64)
                if scored[t + 1] != IGNORED:
                    wanted += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[row[t + 1]]
            engine.release(sequence)
        loss = Loss(engine._shard, tokens)
        assert loss(ids, labels) == pytest.approx(wanted, rel=1e-5)
        assert loss(ids, np.full_like(ids, IGNORED)) == 0.0
        with pytest.raises(EngineError, match="token ids below"):
            loss(np.full((1, 4), vocab), np.zeros((1, 4), int))
        with pytest.raises(EngineError, match="up to 9 tokens a row"):
            loss(np.zeros((1, 10), int), np.zeros((1, 10), int))
        loss.close()

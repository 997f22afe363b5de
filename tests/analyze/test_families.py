"""What the analyses find in tiny models of six families, against what Hugging Face's own modules say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from tests.capture.conftest import (
    FAMILIES,
    PARAGRAPHS,
    build_model,
    build_tokenizer,
    one_thread,  # noqa: F401  # a fixture: these models are too small for two
    run_plainly,
)

from layerlake.analyze.attention import AttentionOptions, AttentionStatistic
from layerlake.analyze.cka import CkaOptions, CkaStatistic
from layerlake.analyze.lens import LensOptions, LensStatistic
from layerlake.analyze.neurons import NeuronOptions, NeuronStatistic, fold_unembedding, unit_unembedding
from layerlake.analyze.norms import COMPONENTS, NormsOptions, NormsStatistic
from layerlake.analyze.reduce import compute_tables
from layerlake.capture.execute import capture_run
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog.run import Run

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Captured:
    """A run of everything in float32, its model, and the same values from Hugging Face alone."""

    run: Run
    model: transformers.PreTrainedModel
    expected: dict[str, Array]
    """site → ``[layer, token, width]``; ``logits`` ``[1, token, vocab]``."""
    final_norm: Any
    w_out: Array
    """``[layer, d_mlp, d_model]``"""

    @property
    def is_layernorm(self) -> bool:
        return isinstance(self.final_norm, torch.nn.LayerNorm)

    @property
    def masked(self) -> Array:
        """The rows of positions 1 … n - 2."""
        positions, documents = (self.run.tokens[name].to_numpy() for name in ("position", "document"))
        return np.flatnonzero((positions >= 1) & (positions <= np.bincount(documents)[documents] - 2))

    def centred(self, x: Array) -> Array:
        """Less the mean over d_model, where the model's norms take it away."""
        return x - x.mean(axis=-1, keepdims=True) if self.is_layernorm else x


@pytest.fixture(scope="module", params=list(FAMILIES))
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """One family's capture."""
    folder, family = tmp_path_factory.mktemp("family"), FAMILIES[request.param]
    (folder / "text.txt").write_text("\n\n".join(PARAGRAPHS))
    tokenizer = build_tokenizer(bos_token="<|end|>", eos_token="<|end|>")  # noqa: S106  # no password
    model = build_model(request.param, len(tokenizer))
    model.set_attn_implementation("eager")  # the only one that gives its weights
    spec = CaptureSpec(
        model=model, tokenizer=tokenizer, dataset=folder / "text.txt", dtype="float32", partition_tokens=96
    )
    run = capture_run(folder / "lake", spec)
    outputs: list[Any] = [
        block.get_submodule(family.projection) for block in model.get_submodule(family.blocks).children()
    ]
    w_out = [
        layer.weight.T if isinstance(layer, torch.nn.Linear) else layer.weight  # GPT-2's is a Conv1D
        for layer in outputs
    ]
    return Captured(
        run,
        model,
        run_plainly(family, model, run),
        model.get_submodule(family.final_norm),
        torch.stack(w_out).detach().double().numpy(),
    )


def log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def head(captured: Captured) -> tuple[Array, Array]:
    """W_U ``[d_model, vocab]`` and b_U of the model."""
    layer: Any = captured.model.get_output_embeddings()
    bias = np.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.detach().double().numpy()
    return layer.weight.detach().double().numpy().T, bias


def test_the_lens_is_the_model_at_the_last_boundary_and_its_last_step_before(captured: Captured) -> None:
    tables = compute_tables(LensStatistic.open, captured.run, LensOptions(tokens="all"))
    n, rows = captured.run.shape.n_layers, captured.masked
    following = captured.run.tokens["token_id"].to_numpy()[rows + 1]
    with torch.inference_mode():
        before = torch.from_numpy(captured.expected["resid"][n - 1, rows])
        unembed: Any = captured.model.get_output_embeddings()
        lens = unembed(captured.final_norm(before)).numpy()
    final = log_softmax(captured.expected["logits"][0, rows])
    tokens = tables["lens_tokens"].to_pandas()
    for boundary, log_p in ((n, final), (n - 1, log_softmax(lens))):
        p = np.exp(log_p)
        expected = {
            "entropy_bits": -(p * log_p).sum(axis=1) / np.log(2),
            "loss_nats": -log_p[np.arange(len(rows)), following],
            "kl_final_lens_nats": (np.exp(final) * (final - log_p)).sum(axis=1),
            "kl_lens_final_nats": (p * (log_p - final)).sum(axis=1),
            "top1_token": p.argmax(axis=1),
        }
        found = tokens[tokens["boundary"] == boundary]
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
        (mean,) = (row for row in tables["lens"].to_pylist() if row["boundary"] == boundary)
        assert mean["loss_nats"] == pytest.approx(expected["loss_nats"].mean(), rel=1e-5)
        assert mean["top1_agreement"] == np.mean(p.argmax(axis=1) == final.argmax(axis=1))
    assert tokens[tokens["boundary"] == n - 1]["kl_final_lens_nats"].mean() > 0.01


def test_neurons_equal_folding_by_hand(captured: Captured) -> None:
    W_U = head(captured)[0] * captured.final_norm.weight.detach().double().numpy()[:, None]
    W_out = captured.centred(captured.w_out)
    if captured.is_layernorm:
        W_U = W_U - W_U.mean(axis=0)
    W_U = W_U - W_U.mean(axis=1, keepdims=True)
    W_U = W_U[:, : len(captured.run.vocab)]  # GPT-NeoX has rows that are no token's
    W_U = W_U / np.linalg.norm(W_U, axis=0)
    cosines = W_out @ W_U / np.linalg.norm(W_out, axis=2, keepdims=True)
    deviations = cosines - cosines.mean(axis=2, keepdims=True)
    z = deviations / cosines.std(axis=2, keepdims=True)
    expected = [cosines.mean(axis=2), cosines.var(axis=2), (z**3).mean(axis=2), (z**4).mean(axis=2)]
    table = compute_tables(NeuronStatistic.open, captured.run, NeuronOptions())["neurons"].to_pandas()
    found = table[["mean", "variance", "skew", "kurtosis"]].to_numpy()
    np.testing.assert_allclose(found, np.stack(expected, axis=-1).reshape(-1, 4), rtol=1e-4, atol=1e-5)
    assert (table["centred"] == captured.is_layernorm).all()


def test_folding_changes_no_distribution(captured: Captured) -> None:
    W_U, b_U = head(captured)
    gamma = captured.final_norm.weight.detach().numpy()
    beta = getattr(captured.final_norm, "bias", None)
    x = captured.centred(captured.expected["resid"][-1].astype(np.float64))
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + captured.run.shape.norm_eps)
    raw = W_U.astype(np.float32)
    folded = fold_unembedding(raw, gamma, layernorm=captured.is_layernorm)
    bias = b_U if beta is None else b_U + beta.detach().double().numpy() @ W_U
    logits = x @ folded + bias
    model = captured.expected["logits"][0]
    np.testing.assert_allclose(log_softmax(logits), log_softmax(model), rtol=0, atol=1e-4)
    assert np.abs(logits - model).max() > 1e-3  # something was taken away
    np.testing.assert_allclose(folded.mean(axis=1), 0, atol=1e-6)
    unit = unit_unembedding(raw, gamma, layernorm=captured.is_layernorm)
    np.testing.assert_allclose(unit, folded / np.linalg.norm(folded, axis=0), atol=1e-6)


def test_attention_locality_of_the_sums_is_that_of_the_pattern(captured: Captured) -> None:
    def rows_of(lacking: str) -> list[dict[str, Any]]:
        sites = {name: held for name, held in captured.run.manifest.sites.items() if name != lacking}
        run = Run(captured.run.store, replace(captured.run.manifest, sites=sites))
        table = compute_tables(AttentionStatistic.open, run, AttentionOptions(variant="authors"))
        rows: list[dict[str, Any]] = table["attention_locality"].to_pylist()
        return rows

    from_sums, from_pattern = rows_of("pattern"), rows_of("attn_band")
    assert ({row.pop("source") for row in from_sums}, {row.pop("source") for row in from_pattern}) == (
        {"attn_band"}, {"pattern"},
    )  # fmt: skip
    n_layers = captured.run.shape.n_layers
    assert len(from_sums) == 17 * n_layers
    for found, expected in zip(from_sums, from_pattern, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    weights = captured.expected["pattern"].mean(axis=1)  # [layer, pair]
    lengths = np.unique(captured.run.tokens["document"].to_numpy(), return_counts=True)[1]
    starts = np.cumsum(lengths * (lengths + 1) // 2) - lengths * (lengths + 1) // 2
    before = [s + t * (t + 1) // 2 + t - 1 for s, n in zip(starts, lengths, strict=True) for t in range(1, n)]
    for layer in range(n_layers):
        row = from_sums[17 * layer + 1]
        assert (row["layer"], row["distance"]) == (layer, 1)
        assert row["mean_weight"] == pytest.approx(weights[layer, before].mean(), rel=1e-5)


def test_norms_are_those_of_the_model_s_vectors(captured: Captured) -> None:
    rows = captured.masked
    norms = {
        "attn_out": captured.expected["attn_out"],
        "mlp_out": captured.expected["mlp_out"],
        "resid_pre": captured.expected["resid"][:-1],
    }
    norms = {name: np.linalg.norm(captured.centred(x[:, rows]), axis=-1) for name, x in norms.items()}
    table = compute_tables(NormsStatistic.open, captured.run, NormsOptions())["norms"].to_pylist()
    assert len(table) == len(COMPONENTS) * captured.run.shape.n_layers
    for row in table:
        own = norms[row["component"]][row["layer"]]
        assert row["mean_norm"] == pytest.approx(own.mean(), rel=1e-5)
        assert row["median_norm"] == pytest.approx(np.median(own), rel=1e-5)
        resid = norms["resid_pre"][row["layer"]]
        assert row["relative_norm"] == pytest.approx(own.mean() / resid.mean(), rel=1e-5)
        assert row["centred"] == captured.is_layernorm


def hsic(grams: Array) -> Array:
    """The unbiased estimator between all of ``[boundary, token, token]``."""
    n = grams.shape[1]
    grams = grams * (1 - np.eye(n))
    sums = grams.sum(axis=2)
    total = sums.sum(axis=1)
    products = np.einsum("ast,bst->ab", grams, grams)
    centred = products + np.outer(total, total) / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums @ sums.T
    return np.asarray(centred / (n * (n - 3)))


def test_cka_is_that_of_the_model_s_vectors(captured: Captured) -> None:
    documents, positions = (captured.run.tokens[name].to_numpy() for name in ("document", "position"))
    x = captured.centred(captured.expected["resid"].astype(np.float64))
    batches = [x[:, (documents == each) & (positions > 0)] for each in np.unique(documents)]
    mean = np.mean([hsic(b @ b.swapaxes(1, 2)) for b in batches if b.shape[1] >= 4], axis=0)
    options = CkaOptions(samples="tokens_per_doc")
    table = compute_tables(CkaStatistic.open, captured.run, options)["cka"]
    expected = mean / np.sqrt(np.outer(np.diag(mean), np.diag(mean)))
    np.testing.assert_allclose(table["cka"].to_numpy(), expected.ravel(), atol=1e-5)
    assert expected.min() < 0.9
    assert table["centred"].to_pylist() == [captured.is_layernorm] * len(table)

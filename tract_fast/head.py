"""The language-model head that returns losses instead of logits.

The module owns the call. FSDP2's hooks gather its weight before ``forward`` and reduce its gradient after ``backward``
in every wrapping; a weight read from outside gives the right loss and a wrong gradient when the head is sharded on its
own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tract_fast.data.batch import Batch
from tract_fast.data.scores import ScoreScale
from tract_fast.errors import UserError
from tract_fast.gather import gather_rows
from tract_fast.loss import (
    QuantizedWeight,
    TractLoss,
    linear_tract_loss,
    native,
    proposal as proposals,
    quantize_weight,
)
from tract_fast.loss.choice import choose
from tract_fast.loss.sampled import language
from tract_fast.sections import Loss


def choose_loss(loss: Loss, dtype: torch.dtype, device: torch.device, config, *, here: bool = True) -> tuple[str, str]:
    """(implementation of the loss that a run takes, reason); ``here``: the device is this machine's. Raises UserError
    where the setting cannot work."""
    text = config.get_text_config()
    try:
        native.check_variant()
    except ValueError as error:
        raise UserError(str(error)) from error
    if loss.gradient == "sampled":
        kind, drawn = language(device.type, dtype), ""
        if loss.proposal != "none":
            if reason := proposals.refusal(loss.proposal, device, dtype, text.hidden_size, here=here):
                raise UserError(f"loss.proposal = {loss.proposal}: {reason}".replace("'", ""))
            drawn = f", drawn from {loss.proposal} logits"
        return "chunked", f"sampled gradient, in {kind}{': slower than exact' if kind == 'PyTorch' else ''}{drawn}"
    try:
        return choose(
            loss.implementation,
            device_type=device.type,
            dtype=dtype,
            n_vocab=text.vocab_size,
            width=text.hidden_size,
            triton=None if here else device.type == "cuda",  # torch for CUDA carries it
        )
    except ValueError as error:
        raise UserError(f"loss.{error}".replace("'", "")) from error


class TractHead(nn.Linear):
    """``nn.Linear`` of D to V whose forward takes hidden states and a batch's targets and returns the losses.

    ``linear`` is the model's own head: its parameters are taken over (a tied weight stays tied). ``softcap`` and
    ``logit_scale`` are what the architecture applies to its logits.
    """

    def __init__(
        self,
        linear: nn.Linear,
        scale: ScoreScale,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        normalize: str = "scores",
        gradient: str = "exact",
        eps: float | None = None,
        proposal: str = "none",
        implementation: str = "auto",
    ):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        # of a model without storage yet, these keep theirs
        device = "cpu" if linear.weight.is_meta else linear.weight.device
        self.register_buffer("score_token_ids", torch.tensor(scale.token_ids, device=device), persistent=False)
        values = torch.tensor(scale.values, dtype=torch.float32, device=device)
        self.register_buffer("score_values", values, persistent=False)
        self.options = {
            "softcap": softcap,
            "logit_scale": logit_scale,
            "normalize": normalize,
            "gradient": gradient,
            "eps": eps,
            "proposal": proposal,
            "implementation": implementation,
        }
        self._quantized: tuple[int, QuantizedWeight] | None = None  # with the version of the weight that it is of

    def forward(self, hidden: Tensor, batch: Batch) -> TractLoss:
        """``hidden`` (T, D): all tokens of the micro-batch. Only the batch's rows reach the GEMM; the end of a shared
        prompt is one row per rationale, each with its own label."""
        return linear_tract_loss(
            gather_rows(hidden, batch.rows),
            self.weight,
            batch.labels,
            batch.score_rows,
            batch.score_targets,
            self.score_token_ids,
            self.score_values,
            bias=self.bias,
            row_weights=batch.row_weights,
            score_weights=batch.score_weights,
            quantized=self._quantized_weight(),
            **self.options,
        )

    def _quantized_weight(self) -> QuantizedWeight | None:
        """The weight in 8 bits where a proposal needs it: that of the step's first micro-batch for all of them."""
        kind = self.options["proposal"]
        if kind == "none" or not torch.is_grad_enabled():
            return None
        version = self.weight._version  # what is changed in place is seen, but not what FSDP2 writes
        if self._quantized is None or self._quantized[0] != version:
            self._quantized = version, quantize_weight(self.weight.detach(), kind)
        return self._quantized[1]

    def weights_changed(self) -> None:
        """Tell the head that the optimizer has changed its weight: a proposal's copy of it is made anew."""
        if self.weight.requires_grad:
            self._quantized = None

    @contextlib.contextmanager
    def without_proposal(self) -> Iterator[None]:
        """Draw from exact logits inside."""
        options = self.options
        self.options = options | {"proposal": "none"}
        try:
            yield
        finally:
            self.options = options

"""The endpoint that a comparison asks: one that was given, or one of its own."""

import contextlib
from collections.abc import Mapping
from typing import Any

from graftwork.serving.app import Endpoint, deploy
from graftwork.serving.experiment.offline import EvalRequest
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.spec import ArmSpec, ServeSpec


class Endpoints:
    """The endpoint that was given, or one that is deployed when it is first needed."""

    def __init__(self, spec: CompareSpec, given: Endpoint | None, pinned: Mapping[str, ArmSpec]) -> None:
        self._spec, self._pinned, self.endpoint = spec, pinned, given
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Endpoints":
        self._open.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._open.__exit__(*exc)

    def open(self) -> None:
        """Deploys, where nothing is. Not within a running event loop."""
        spec = self._spec
        if self.endpoint is None:
            serve = ServeSpec(
                name=f"compare-{spec.name}"[:63], root=spec.root, base=spec.base, quant=spec.quant, engine=spec.engine,
                max_ongoing_requests=max(512, 2 * spec.concurrency), num_cpus=spec.num_cpus, num_gpus=spec.num_gpus,
            )  # fmt: skip
            self.endpoint = self._open.enter_context(deploy(serve, http=False))

    async def ask(self, arm: ArmSpec, messages: list[dict[str, str]], request_id: str) -> Mapping[str, Any]:
        """An arm's answer."""
        assert self.endpoint is not None, "an answer is asked for although all are on disk"
        return await self.endpoint.ask(self._as_pinned(arm), messages, request_id)

    async def send(self, job: EvalRequest) -> Mapping[str, Any]:
        """An answer, or likelihoods."""
        if not job.continuations:
            return await self.ask(job.arm, job.messages, job.request_id)
        assert self.endpoint is not None, "likelihoods are asked for although all are on disk"
        told = await self.endpoint.likelihood(
            self._as_pinned(job.arm), job.messages, list(job.continuations), job.request_id
        )
        return {"logprobs": [(one["logprob"], one["tokens"]) for one in told]}

    def _as_pinned(self, arm: ArmSpec) -> ArmSpec:
        """A derived arm keeps its arm's version; one of another name (the judge) comes with its own."""
        pinned = self._pinned.get(arm.name)
        return arm.with_({"adapter": pinned.adapter}) if arm.adapter and pinned else arm

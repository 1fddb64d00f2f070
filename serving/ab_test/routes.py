"""HTTP routes of experiments: feedback for users, the rest for the admin token."""

from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from graftwork.serving.ab_test.live_experiment import FeedbackRequest, LiveExperiment
from graftwork.serving.ab_test.service import Experiments, status
from graftwork.serving.ab_test.spec import ArmName, Weight
from graftwork.serving.api.admin import Route
from graftwork.serving.api.auth import read_body
from graftwork.serving.api.openai_protocol import parse
from graftwork.storage.store import NAME_PATTERN

EXPERIMENTS = "/v1/admin/experiments"
FEEDBACK = "/v1/feedback"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class StartRequest(BaseModel):
    """Body of POST /v1/admin/experiments/start."""

    model_config = ConfigDict(strict=True, extra="forbid")
    spec: dict[str, Any]
    """An ExperimentSpec (`graftwork config schema experiment`)."""


class NameRequest(BaseModel):
    """Body of stop, kill and resume."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: Name


class RampRequest(NameRequest):
    """Body of POST /v1/admin/experiments/ramp."""

    weights: dict[ArmName, Weight]
    """Of every arm; they sum to 1."""


class ExperimentRoutes:
    """One method a route."""

    def __init__(self, experiments: Experiments) -> None:
        self._experiments = experiments

    def routes(self) -> list[Route]:
        """(path, handler, body) of every POST route."""
        owned: list[Route] = [
            ("start", self.start, StartRequest),
            ("ramp", self.ramp, RampRequest),
            ("stop", self.stop, NameRequest),
            ("kill", self.kill, NameRequest),
            ("resume", self.resume, NameRequest),
        ]
        return [
            *((f"{EXPERIMENTS}/{verb}", call, body) for verb, call, body in owned),
            (FEEDBACK, self.feedback, FeedbackRequest),
        ]

    async def listing(self) -> Response:
        """GET /v1/admin/experiments: what each is doing now."""
        return _list_response(await self._experiments.all())

    async def start(self, request: Request) -> Response:
        """POST .../start: begin one, or find that it runs already."""
        body = parse(StartRequest, await read_body(request))
        return _list_response([await self._experiments.start(body.spec)])

    async def ramp(self, request: Request) -> Response:
        """POST .../ramp: other weights from now on."""
        body = parse(RampRequest, await read_body(request))
        return _list_response([await self._experiments.ramp(body.name, dict(body.weights))])

    async def stop(self, request: Request) -> Response:
        """POST .../stop: end it; its control answers everybody."""
        body = parse(NameRequest, await read_body(request))
        return _list_response([await self._experiments.stop(body.name)])

    async def kill(self, request: Request) -> Response:
        """POST .../kill: the control answers everybody until `resume`."""
        body = parse(NameRequest, await read_body(request))
        return _list_response([await self._experiments.kill(body.name, on=True)])

    async def resume(self, request: Request) -> Response:
        """POST .../resume: take `kill` back."""
        body = parse(NameRequest, await read_body(request))
        return _list_response([await self._experiments.kill(body.name, on=False)])

    async def feedback(self, request: Request) -> Response:
        """POST /v1/feedback: scores of an answer that was given before."""
        body = parse(FeedbackRequest, await read_body(request))
        return JSONResponse(await self._experiments.feedback(body))


def _list_response(lives: list[LiveExperiment]) -> Response:
    return JSONResponse({"object": "list", "data": [status(live) for live in lives]})

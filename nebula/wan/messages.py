"""Between the values of `nebula.types` and the protobuf messages that carry them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from nebula.proto.v1 import run_pb2 as pb
from nebula.types import Beat, Evaluation, Held, RoundPlan, RoundReport

_ACTIONS: dict[pb.PlanResponse.Action.ValueType, Literal["train", "catch_up", "stop", "done"]] = {
    pb.PlanResponse.ACTION_TRAIN: "train",
    pb.PlanResponse.ACTION_CATCH_UP: "catch_up",
    pb.PlanResponse.ACTION_STOP: "stop",
    pb.PlanResponse.ACTION_DONE: "done",
}
_ACTION_VALUES = {name: value for value, name in _ACTIONS.items()}


def plan_request(held: Mapping[str, Held], report: RoundReport | None) -> pb.PlanRequest:
    message = pb.PlanRequest(held={name: pb.Held(version=h.version, digest=h.digest) for name, h in held.items()})
    if report is not None:
        message.report.CopyFrom(
            pb.RoundReport(
                round=report.round,
                steps=report.steps,
                tokens=report.tokens,
                loss=report.loss,
                compute_seconds=report.compute_s,
                stall_seconds=report.stall_s,
                up_bytes=report.up_bytes,
                down_bytes=report.down_bytes,
                payload_up_bytes=report.payload_up_bytes,
                payload_down_bytes=report.payload_down_bytes,
                retries=report.retries,
                rtt_seconds=report.rtt_s,
                life=report.life,
                eval_loss_sum=report.eval.loss_sum if report.eval else 0.0,
                eval_tokens=report.eval.tokens if report.eval else 0,
            )
        )
    return message


def held_of(message: pb.PlanRequest) -> dict[str, Held]:
    return {name: Held(h.version, h.digest) for name, h in message.held.items()}


def report_of(message: pb.PlanRequest) -> RoundReport | None:
    if not message.HasField("report"):
        return None
    r = message.report
    return RoundReport(
        round=r.round,
        steps=r.steps,
        tokens=r.tokens,
        loss=r.loss,
        compute_s=r.compute_seconds,
        stall_s=r.stall_seconds,
        up_bytes=r.up_bytes,
        down_bytes=r.down_bytes,
        payload_up_bytes=r.payload_up_bytes,
        payload_down_bytes=r.payload_down_bytes,
        retries=r.retries,
        rtt_s=r.rtt_seconds,
        life=r.life,
        eval=Evaluation(loss_sum=r.eval_loss_sum, tokens=r.eval_tokens) if r.eval_tokens else None,
    )


def beat_request(beat: Beat) -> pb.BeatRequest:
    return pb.BeatRequest(round=beat.round, step=beat.step, steps=beat.steps, leaving=beat.leaving)


def beat_of(message: pb.BeatRequest) -> Beat:
    return Beat(round=message.round, step=message.step, steps=message.steps, leaving=message.leaving)


def plan_response(plan: RoundPlan) -> pb.PlanResponse:
    return pb.PlanResponse(
        action=_ACTION_VALUES[plan.action],
        round=plan.round,
        inner_steps=plan.inner_steps,
        position=plan.position,
        fragments=[pb.FragmentPlan(name=name, base=base) for name, base in sorted(plan.fragments.items())],
        eval_index=plan.eval_index,
        eval_count=plan.eval_count,
        reason=plan.reason,
    )


def plan_of(message: pb.PlanResponse) -> RoundPlan:
    return RoundPlan(
        action=_ACTIONS[message.action],
        round=message.round,
        inner_steps=message.inner_steps,
        position=message.position,
        fragments={f.name: f.base for f in message.fragments},
        eval_index=message.eval_index,
        eval_count=message.eval_count,
        reason=message.reason,
    )

"""Ray's autoscaler beside the head: one version, told in one place."""

from graftwork.cluster.kuberay.findings import Found, dig, listed, number, refuse
from graftwork.cluster.kuberay.rules.part import AUTOSCALER_V2_ENV, ClusterView

START_ENV = "KUBERAY_GEN_AUTOSCALER_START_CMD"


def version_said_once(part: ClusterView) -> Found:
    where, told = f"{part.where}.autoscalerOptions.version", dig(part.spec, "autoscalerOptions", "version")
    value = part.head_env.get(AUTOSCALER_V2_ENV)
    if not part.autoscales and value in ("1", "true"):
        yield refuse("AUTOSCALER-ENV", f"{part.where}.headGroupSpec", f"{AUTOSCALER_V2_ENV}={value}",
                     "the variable needs enableInTreeAutoscaling", "enableInTreeAutoscaling: true")  # fmt: skip
    if part.autoscales and told is not None and AUTOSCALER_V2_ENV in part.head_env:
        yield refuse("AUTOSCALER-TWICE", where, f"the head has {AUTOSCALER_V2_ENV} too",
                     "the version is told in one place", f"drop {AUTOSCALER_V2_ENV}")  # fmt: skip


def v2_restarts_no_pod(part: ClusterView) -> Found:
    if not (part.autoscales and part.autoscaler_v2):
        return
    for where, pod in part.pods():
        if pod.get("restartPolicy") not in (None, "", "Never"):
            yield refuse("AUTOSCALER-RESTART", f"{where}.restartPolicy", str(pod["restartPolicy"]),
                         "autoscaler v2 replaces pods and restarts none", "leave it out, or Never")  # fmt: skip


def idle_is_no_less_than_nothing(part: ClusterView) -> Found:
    idle = number(dig(part.spec, "autoscalerOptions", "idleTimeoutSeconds"))
    if idle is not None and idle < 0:
        yield refuse("AUTOSCALER-IDLE", f"{part.where}.autoscalerOptions.idleTimeoutSeconds", f"{idle}", "0 or more")


def start_command_is_the_operators(part: ClusterView) -> Found:
    if START_ENV in {entry.get("name") for entry in listed(dig(part.spec, "autoscalerOptions", "env"))}:
        yield refuse("AUTOSCALER-START", f"{part.where}.autoscalerOptions.env", START_ENV, "the operator sets it")


AUTOSCALER_RULES = (version_said_once, v2_restarts_no_pod, idle_is_no_less_than_nothing, start_command_is_the_operators)

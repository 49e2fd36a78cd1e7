"""The functions of NVML that a worker uses, for one GPU that is not there."""

from __future__ import annotations

from types import SimpleNamespace

UUID = "GPU-00000000-1111-2222-3333-444444444444"


class OneGpu:
    """Stands in for the module `pynvml`. A GPU that is `lost` cannot be read."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.lost = False

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self.check(handle)
        return SimpleNamespace(gpu=37, memory=5)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        self.check(handle)
        return SimpleNamespace(used=3 * 2**30, free=77 * 2**30, total=80 * 2**30)

    def check(self, handle: str) -> None:
        assert handle == "handle"
        if self.lost:
            raise self.NVMLError("GPU is lost")

# Sourced at the root of a copy of this tree on a machine with a GPU and no network:
#
#   . bench/gpu_bench/environment.sh
#
# Unpacks what `make gpu-wheels` collected, once, beside the machine's own torch, triton and transformers, puts
# it and the sources on Python's path. The first time it says what machine this is and what cannot be imported.

_wheels=${WHEELS:-build/gpu-wheels}
_site=${SITE:-${TMPDIR:-/tmp}/sfllm-wheels}
export PYTHONPATH="$_site:$PWD/shared:$PWD/services/gateway:$PWD/services/scheduler:$PWD/services/worker:$PWD/cli"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if ! [ -e "$_site/complete" ]; then
    rm -rf "$_site"
    python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$_site" "$_wheels"/*.whl ||
        for _wheel in "$_wheels"/*.whl; do python3 -m zipfile -e "$_wheel" "$_site" || break; done
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm --format=csv,noheader || true
    python3 - <<'PROBE'
import importlib, os, platform, shutil

print(f"Python {platform.python_version()}, {os.cpu_count()} cores, C compiler {shutil.which('cc') or 'missing'}")
for name in ("torch", "triton", "transformers", "numpy", "msgspec", "zmq", "fastapi", "uvloop", "sfllm"):
    try:
        module = importlib.import_module(name)
        print(f"{name} {getattr(module, '__version__', '')} {module.__file__}")
    except Exception as error:
        print(f"{name} CANNOT BE IMPORTED: {error!r}")
PROBE
    touch "$_site/complete"
fi

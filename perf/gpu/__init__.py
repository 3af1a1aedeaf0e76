"""The steps of `perf/on_gpu.sh`: builds ahead of time, every call once, hardware counters, the tuner."""

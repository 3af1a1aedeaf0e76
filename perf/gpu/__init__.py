"""What `perf/on_gpu.sh` runs on a GPU: builds ahead of time, every call once, counters, the tuner."""

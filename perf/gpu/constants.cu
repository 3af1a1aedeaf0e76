// What `mhc-tilelang predict` needs to know of a device, measured on it; prints JSON, which constants.py reads.
//
//   copies    reads : writes of 1:1, 2:1, 4:1, 1:4 and 0:1 arrays, two sizes each: the slope is a bandwidth, without launch
//   chase     one thread follows pointers through more memory than any cache holds: the latency of a load
//   empty     kernels that do nothing, of 1 block and of many: a launch, the start of a block
//   barriers  one block of 4 to 32 warps that does nothing but meet
//   spin      a million dependent additions, by clock64 and by the event: the clock under which all that ran
//
// Every time is the smallest of ROUNDS, of events around REPEATED launches.

#ifndef MHC_KERNELS_ONLY
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>
#endif

#define THREADS 256  // of a block that copies

// `from` holds `reads` arrays one after the other, `to` holds `writes`; each has `count` elements of 16 bytes.
extern "C" __global__ void copy_mix(float4* __restrict__ to, const float4* __restrict__ from, int blocks, int count, int reads, int writes) {
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < count; i += blocks * THREADS) {
    float sum = 0;
    for (int k = 0; k < reads; ++k) {
      float4 read = from[(long long)k * count + i];
      sum += read.x + read.y + read.z + read.w;
    }
    for (int k = 0; k < writes; ++k) to[(long long)k * count + i] = make_float4(sum, sum, sum, sum);
  }
}

extern "C" __global__ void chase(int* __restrict__ last, const int* __restrict__ next, int steps) {
  int at = 0;
  for (int i = 0; i < steps; ++i) at = next[at];
  *last = at;
}

extern "C" __global__ void empty() {}

extern "C" __global__ void meet(int* __restrict__ done, int times) {
  for (int i = 0; i < times; ++i) __syncthreads();
  if (threadIdx.x == 0) *done = times;
}

#ifndef MHC_KERNELS_ONLY
extern "C" __global__ void spin(long long* cycles, int times, int one) {
  long long start = clock64();
  int sum = 0;
  for (int i = 0; i < times; ++i) sum = sum * one + i;
  cycles[0] = clock64() - start;
  cycles[1] = sum;
}

constexpr int ROUNDS = 7, LINE_INTS = 32;

#define CHECK(call)                                                                     \
  do {                                                                                  \
    cudaError_t error = (call);                                                         \
    if (error != cudaSuccess) {                                                         \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));               \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (0)

template <typename Launch>
double microseconds(int repeated, Launch launch) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  float best = 1e30f;
  for (int round = 0; round < ROUNDS; ++round) {
    CHECK(cudaEventRecord(start));
    for (int k = 0; k < repeated; ++k) launch();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaGetLastError());
    float taken;
    CHECK(cudaEventElapsedTime(&taken, start, end));
    best = std::min(best, taken);
  }
  return 1e3 * best / repeated;
}

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  const int sms = device.multiProcessorCount;
  std::printf("{\"name\": \"%s\", \"major\": %d, \"minor\": %d, \"sms\": %d, \"l2_bytes\": %lld,\n", device.name,
              device.major, device.minor, sms, (long long)device.l2CacheSize);

  const long long bytes = 1LL << 30;
  char* memory;
  CHECK(cudaMalloc(&memory, 5 * bytes));
  CHECK(cudaMemset(memory, 0, 5 * bytes));
  std::printf(" \"copies\": [");
  const int mixes[][2] = {{1, 1}, {2, 1}, {4, 1}, {1, 4}, {0, 1}};
  for (const auto& mix : mixes)
    for (long long size : {bytes / 4, bytes}) {
      const int count = int(size / 16), blocks = sms * 16;
      auto* from = reinterpret_cast<float4*>(memory);
      auto* to = from + (long long)mix[0] * count;
      const double us = microseconds(5, [&] { copy_mix<<<blocks, THREADS>>>(to, from, blocks, count, mix[0], mix[1]); });
      const bool first = mix == mixes[0] && size != bytes;
      std::printf("%s{\"reads\": %d, \"writes\": %d, \"bytes\": %lld, \"us\": %.4f}", first ? "" : ", ", mix[0], mix[1],
                  (mix[0] + mix[1]) * size, us);
    }

  // A random cycle over the lines of a gigabyte: no prefetch, hardly a hit.
  const int lines = int(bytes / (4 * LINE_INTS)), steps = 20000;
  std::vector<int> order(lines), next(size_t(lines) * LINE_INTS);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin() + 1, order.end(), std::mt19937(1));
  for (int k = 0; k < lines; ++k) next[size_t(order[k]) * LINE_INTS] = order[(k + 1) % lines] * LINE_INTS;
  CHECK(cudaMemcpy(memory, next.data(), bytes, cudaMemcpyHostToDevice));
  auto* last = reinterpret_cast<int*>(memory + 2 * bytes);
  auto* pointers = reinterpret_cast<int*>(memory);
  const double chased = microseconds(1, [&] { chase<<<1, 1>>>(last, pointers, steps); });
  const double started = microseconds(1, [&] { chase<<<1, 1>>>(last, pointers, 0); });
  std::printf("],\n \"chase\": {\"steps\": %d, \"us\": %.4f},\n", steps, chased - started);

  const int many = sms * 32 * 64;
  std::printf(" \"empty\": {\"blocks\": %d, \"one_us\": %.5f, \"many_us\": %.5f},\n", many,
              microseconds(2000, [&] { empty<<<1, 32>>>(); }), microseconds(50, [&] { empty<<<many, 128>>>(); }));

  const int times = 20000;
  std::printf(" \"barriers\": [");
  for (int warps = 4; warps <= 32; warps *= 2)
    std::printf("%s{\"warps\": %d, \"times\": %d, \"us\": %.4f}", warps > 4 ? ", " : "", warps, times,
                microseconds(3, [&] { meet<<<1, 32 * warps>>>(last, times); }));

  long long* cycles = reinterpret_cast<long long*>(memory);
  const int spins = 4000000;
  const double spun = microseconds(1, [&] { spin<<<1, 1>>>(cycles, spins, 1); });
  long long counted;
  CHECK(cudaMemcpy(&counted, cycles, sizeof counted, cudaMemcpyDeviceToHost));
  std::printf("],\n \"spin\": {\"cycles\": %lld, \"us\": %.4f}}\n", counted, spun);
  return 0;
}
#endif

// What the code of a kernel asks of the executor, and what the host asks of it.
//
// Two translation units meet here: the kernel's, which includes device.h and is compiled with -fsanitize=thread so
// that every load and store calls the executor first, and the executor's own, which is not instrumented.

#pragma once

#include <cstdint>

struct SimtIndex {
    unsigned x, y, z;
};

enum SimtOperation : int { SIMT_SYNCWARP, SIMT_SHUFFLE, SIMT_LDMATRIX, SIMT_MMA };
enum SimtOperand : int { SIMT_BFLOAT16, SIMT_FLOAT16, SIMT_TFLOAT32 };

enum SimtAtomic : int { SIMT_ADD, SIMT_LOAD, SIMT_STORE };

// What one lane brings to an operation of its warp; which members count depends on the operation.
struct SimtLane {
    uint32_t value;          // shuffle: what the lane gives, then what it gets
    int exclusive_or;        // shuffle: of its number and that of the lane that it gets from
    const void* row;         // ldmatrix: the row whose address this lane holds
    uint32_t* out;           // ldmatrix: the lane's registers, one a matrix
    int matrices;            // ldmatrix: 1, 2 or 4
    bool transposed;         // ldmatrix: .trans
    SimtOperand operand;     // mma: type of a and b
    float* c;                // mma: the lane's four sums, in place
    const uint32_t *a, *b;   // mma: the lane's operands
};

extern "C" {
alignas(1024) extern char simt_shared_memory[1 << 20];  // the dynamic part, of which a launch has some

// Of the thread that runs. They never change within one, hence const.
SimtIndex simt_thread_index() __attribute__((const));
SimtIndex simt_block_index() __attribute__((const));

void simt_barrier(int id, int count);  // bar.sync id, count; 0 counts the whole block
void simt_warp(SimtOperation operation, SimtLane* lane);
void simt_copy_async(void* to, const void* from, int bytes, bool zero);  // cp.async; zero: fill instead of reading
void simt_copy_commit();
void simt_copy_wait(int pending);  // until at most so many groups of this thread are under way
int simt_atomic(SimtAtomic operation, int* at, int value, int order);  // the value before; order: cuda::memory_order
void simt_fence();
}

// ---- the host's side ------------------------------------------------------------------------------------------

struct SimtTensor {
    const char* name;
    char* data;
    int64_t bytes;
    int64_t element_bytes;
    int64_t read_only;  // to the kernel
    // Counted: bytes that threads asked for, 32-byte sectors that warps asked for, bytes touched at all.
    int64_t read_bytes, written_bytes, read_sectors, written_sectors, read_distinct, written_distinct;
};

struct SimtFinding {
    char kind[32];
    char text[480];
    int64_t times;
    const void* site;  // the instruction, in the kernel's library
};

// An instruction whose accesses to shared memory met in a bank.
struct SimtConflict {
    const void* site;
    int64_t wavefronts, conflicts;
};

struct SimtLaunch {
    SimtIndex grid, block;
    int64_t shared_bytes;        // dynamic
    int64_t most_static, most;   // of static shared memory, and of both
    int resident;                // blocks at a time, of a kernel with atomics; else 0
    int seed;                    // of the order of those blocks; 0: ascending
    int num_tensors, num_scalars;
    SimtTensor* tensors;
    void** scalars;
    // Out:
    int num_findings, left_out;
    SimtFinding findings[16];
    int64_t shared_wavefronts, shared_conflicts, barriers, mma;
    int num_conflicts;
    SimtConflict conflicts[8];  // the worst first
};

extern "C" int simt_launch(SimtLaunch* launch);
// Defined by the kernel's translation unit: call the kernel with these arguments.
extern "C" void simt_call_kernel(void** arguments);

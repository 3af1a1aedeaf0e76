// The executor's state: threads, regions of memory, and what the files beside it do with them.
//
//     executor.cpp   runs blocks and threads, places tensors, answers the kernel's calls
//     accesses.cpp   watches loads and stores
//     together.cpp   barriers, operations of a warp, asynchronous copies
//     atomics.cpp    blocks that synchronise by atomics

#pragma once

#include <setjmp.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "between.h"
#include "counts.h"
#include "findings.h"
#include "interface.h"
#include "shadow.h"

namespace simt {

constexpr size_t STACK_BYTES = 256 * 1024;
// Between tensors, where nothing is mapped, and no power of two, which wrong indices are often off by.
constexpr size_t GAP = (size_t(1) << 30) + 1234567 * 256;

struct Copy {
    char *to, *from;
    int bytes;
    bool zero;
    const void* site;
};

enum class Atomic { ADD = SIMT_ADD, LOAD = SIMT_LOAD, STORE = SIMT_STORE };
enum class Order { RELAXED, CONSUME, ACQUIRE, RELEASE, ACQ_REL, SEQ_CST };
enum class State { READY, AT_BARRIER, IN_WARP, ENDED };

struct Thread {
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    State state;
    bool started;
    int barrier, expected;  // it waits for
    SimtOperation operation;
    SimtLane* lane;
    const void* site;
    Clock clock;
    std::deque<std::vector<Copy>> groups;  // of copies under way; the last one is open
    Knowledge known, fenced, read;         // of other blocks: now, at the last fence, by relaxed atomics since
};

// A region of memory that threads share, and what is known of each unit of it.
struct Region {
    char* base = nullptr;
    int64_t bytes = 0;
    int unit = UNIT;  // 1 for a tensor of single bytes
    Shadow shadow;
    std::vector<uint16_t> copying;  // shared memory: thread + 1 whose copy is under way
    // Tensors: the block that wrote last, the one that read last, whether an earlier one read. 0: none.
    std::vector<uint32_t> writer_block, reader_block;
    std::vector<bool> read_before;
    GridShadow between;  // the same, where atomics order blocks
    std::vector<WarpAccesses> reads, writes;  // of each warp

    bool holds(const char* at) const { return at >= base && at < base + bytes; }
};

// A block that is on the device and not running.
struct Block {
    SimtIndex index;
    uint32_t number;
    std::vector<Thread> threads;
    Region shared[2];
    std::vector<char> memory[2];
    std::vector<std::vector<WarpAccesses>> accesses;  // not counted yet: reads and writes of each region
};

struct Executor {
    SimtLaunch& launch;
    Findings findings;
    std::vector<Thread> threads;
    Thread* current = nullptr;
    jmp_buf scheduler;
    SimtIndex block = {0, 0, 0};
    uint32_t block_number = 0;
    bool aborted = false, turn_over = false;
    std::deque<std::unique_ptr<Block>> on_device;
    std::unordered_map<const void*, Knowledge> released;  // by address
    uint32_t ended_blocks = 0;
    int64_t idle = 0;  // polls since anything else was done
    std::vector<Region> tensors;
    Region shared[2];  // dynamic, static
    std::unordered_map<const void*, Passes> passes;  // over shared memory, by instruction
    char* arena = nullptr;
    size_t arena_bytes = 0;
    void** arguments = nullptr;

    explicit Executor(SimtLaunch& l) : launch(l), findings(l) {}

    uint16_t index() const { return uint16_t(current - threads.data()); }
    int num_threads() const { return int(threads.size()); }
    int lanes_of(int warp) const { return std::min(32, num_threads() - 32 * warp); }
    SimtIndex thread_index(int t) const {
        const unsigned x = launch.block.x, y = launch.block.y;
        return {t % x, t / x % y, t / (x * y)};
    }

    // ---- running ------------------------------------------------------------------------------------------------

    void yield() {
        if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
    }
    [[noreturn]] void abort_launch() {
        aborted = true;
        _longjmp(scheduler, 1);
    }
    void run(Thread& thread);
    void begin_block();
    bool run_turn();  // until the block has ended, or its turn is over
    void run_block();
    void run_together();
    void report_hang();
    std::vector<Thread> make_threads() const;
    uint32_t number_of_blocks() const { return launch.grid.x * launch.grid.y * launch.grid.z; }

    void place_tensors();
    void run_grid();
    void count_block();
    void count_conflicts();

    // ---- accesses -----------------------------------------------------------------------------------------------

    void access(char* at, int bytes, bool write, const void* site);
    void access_range(char* at, size_t bytes, bool write, const void* site) {
        if (on_stack(at)) return;  // structures of ours
        if (bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16) return access(at, int(bytes), write, site);
        findings.add("unsupported access", site, "no GPU's access has %zu bytes", bytes);
        abort_launch();
    }
    void touch_shared(Region& region, char* at, int bytes, bool write, const void* site, bool copied = false);
    void touch_tensor(int tensor, char* at, int bytes, bool write, const void* site);
    void race(const char* where, int64_t offset, uint16_t rival, bool write, const void* site);
    Region* shared_at(const char* at) {
        for (Region& region : shared)
            if (region.holds(at)) return &region;
        return nullptr;
    }
    int tensor_at(const char* at) const {
        for (size_t k = 0; k < tensors.size(); ++k)
            if (tensors[k].holds(at)) return int(k);
        return -1;
    }
    bool on_stack(const char* at) const {
        return at >= current->stack.get() && at < current->stack.get() + STACK_BYTES;
    }
    [[noreturn]] void out_of_bounds(const char* at, int bytes, bool write, const void* site);
    std::string who(uint16_t thread) const {
        const SimtIndex i = thread_index(thread);
        char text[96];
        std::snprintf(text, sizeof text, "thread (%u, %u, %u) of block (%u, %u, %u)", i.x, i.y, i.z, block.x, block.y, block.z);
        return text;
    }

    // ---- together -----------------------------------------------------------------------------------------------

    bool comes_after(const Touch& other) const;
    Knowledge all_known();
    void acquire(const Knowledge& given);
    void fence();
    int atomic(Atomic operation, int* at, int value, Order order, const void* site);
    void touch_between(int tensor, int64_t unit, bool write, bool atomic, const void* site);
    void take_turns(bool polls, const void* site);
    void exchange(Block& with);

    void meet(const std::vector<uint16_t>& those);
    void barrier(int id, int count, const void* site);
    void warp(SimtOperation operation, SimtLane* lane, const void* site);
    void copy_async(Copy copy);
    void copy_wait(size_t pending);
};

extern Executor* executor;  // of the launch that runs

}  // namespace simt

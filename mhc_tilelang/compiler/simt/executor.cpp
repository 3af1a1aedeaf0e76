// Runs a grid block by block, the threads of a block as fibers, and answers what the kernel's code calls.
//
// A thread runs until it must wait, at a barrier or for the other lanes of its warp. Loads and stores of the kernel's
// code come here first through the calls that -fsanitize=thread puts before them. An access that would leave its
// tensor, or that the hardware would refuse, ends the launch before it is made; everything else is noted and goes on.

#include "executor.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>

#define SITE __builtin_return_address(0)

// Static shared memory of the kernel, from the linker, if it has any; the dynamic part is in the array below.
extern "C" char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));
alignas(1024) char simt_shared_memory[sizeof simt_shared_memory];

namespace simt {

Executor* executor = nullptr;

void begin_thread() {
    simt_call_kernel(executor->arguments);
    executor->current->state = State::ENDED;
    executor->yield();
}

void Executor::run(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler) != 0) return;  // it waits, has ended, or the launch is over
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack.get();
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, begin_thread, 0);
    setcontext(&context);
}

std::vector<Thread> Executor::make_threads() const {
    std::vector<Thread> made(size_t(launch.block.x) * launch.block.y * launch.block.z);
    for (Thread& thread : made) thread.stack.reset(new char[STACK_BYTES]);
    return made;
}

void Executor::begin_block() {
    for (Region& region : shared) {
        std::memset(region.base, 0xFF, region.bytes);  // NaN in every type
        region.shadow.reset(region.bytes / UNIT + 1);
        region.copying.assign(region.bytes / UNIT + 1, 0);
    }
    for (Region& region : tensors) region.shadow.new_block();
    for (int t = 0; t < num_threads(); ++t) {
        Thread& thread = threads[t];
        thread.state = State::READY;
        thread.started = false;
        thread.groups.assign(1, {});
        thread.clock.assign(num_threads(), 0);
        thread.clock[t] = 1;
    }
}

bool Executor::run_turn() {
    turn_over = false;
    for (bool progress = true; progress && !aborted;) {
        progress = false;
        for (Thread& thread : threads)
            if (thread.state == State::READY && !aborted) {
                progress = true;
                run(thread);
                if (turn_over) return false;
            }
    }
    if (!aborted) report_hang();
    return true;
}

void Executor::run_block() {
    begin_block();
    run_turn();
    count_block();
}

void Executor::report_hang() {
    int waiting = 0, ended = 0;
    const Thread* first = nullptr;
    for (const Thread& thread : threads) {
        ended += thread.state == State::ENDED;
        if (thread.state == State::AT_BARRIER || thread.state == State::IN_WARP) {
            ++waiting;
            if (!first) first = &thread;
        }
    }
    if (!waiting) return;
    const bool at_barrier = first->state == State::AT_BARRIER;
    int with_it = 0;
    for (const Thread& thread : threads)
        with_it += thread.state == first->state && (!at_barrier || thread.barrier == first->barrier);
    const std::string whom = who(uint16_t(first - threads.data()));
    if (at_barrier)
        findings.add("divergent barrier", first->site,
                     "%s waits at barrier %d for %d threads, %d have come; %d of %d threads have ended: a hang on a GPU",
                     whom.c_str(), first->barrier, first->expected, with_it, ended, num_threads());
    else
        findings.add("divergent warp", first->site,
                     "%s waits for the other lanes of its warp, which do something else; %d of %d threads have ended",
                     whom.c_str(), ended, num_threads());
    aborted = true;
}

// ---- the grid -----------------------------------------------------------------------------------------------------

// Copies of the tensors, far apart, that start where the originals start within 256 bytes.
void Executor::place_tensors() {
    tensors.resize(launch.num_tensors);
    arena_bytes = GAP;
    for (int k = 0; k < launch.num_tensors; ++k) arena_bytes += launch.tensors[k].bytes / GAP * GAP + 2 * GAP;
    arena = static_cast<char*>(mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (arena == MAP_FAILED) {
        findings.add("no memory", nullptr, "cannot reserve %zu bytes of addresses", arena_bytes);
        aborted = true;
        return;
    }
    char* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(arena) + GAP) & ~uintptr_t(255));
    const size_t warps = (num_threads() + WARP - 1) / WARP;
    for (int k = 0; k < launch.num_tensors; ++k) {
        SimtTensor& tensor = launch.tensors[k];
        Region& region = tensors[k];
        region.base = at + reinterpret_cast<uintptr_t>(tensor.data) % 256;
        region.bytes = tensor.bytes;
        std::memcpy(region.base, tensor.data, tensor.bytes);
        region.unit = launch.resident ? UNIT : std::min(UNIT, int(tensor.element_bytes));
        const size_t units = tensor.bytes / region.unit + 1;
        region.shadow.reset(units);
        region.writer_block.assign(units, 0);
        region.reader_block.assign(units, 0);
        region.read_before.assign(units, false);
        region.between.reset(launch.resident ? units : 0);
        region.reads.resize(warps);
        region.writes.resize(warps);
        at += tensor.bytes / GAP * GAP + 2 * GAP;
        tensor.read_bytes = tensor.written_bytes = tensor.read_sectors = tensor.written_sectors = 0;
        tensor.read_distinct = tensor.written_distinct = 0;
    }
    shared[0].base = simt_shared_memory;
    shared[0].bytes = launch.shared_bytes;
    shared[1].base = __start_simt_shared;
    shared[1].bytes = __stop_simt_shared - __start_simt_shared;
    for (Region& region : shared) {
        region.reads.resize(warps);
        region.writes.resize(warps);
    }
}

void Executor::count_block() {
    for (size_t k = 0; k < tensors.size(); ++k) {
        SimtTensor& tensor = launch.tensors[k];
        for (WarpAccesses& warp : tensors[k].reads)
            warp.drain([&](const void*, const std::vector<Access>& all) { tensor.read_sectors += sectors_of(all); });
        for (WarpAccesses& warp : tensors[k].writes)
            warp.drain([&](const void*, const std::vector<Access>& all) { tensor.written_sectors += sectors_of(all); });
    }
    for (Region& region : shared)
        for (auto* accesses : {&region.reads, &region.writes})
            for (WarpAccesses& warp : *accesses)
                warp.drain([&](const void* site, const std::vector<Access>& all) {
                    const Passes more = passes_of(all);
                    passes[site].taken += more.taken;
                    passes[site].needed += more.needed;
                });
}

void Executor::count_conflicts() {
    std::vector<SimtConflict> met;
    for (const auto& [site, of_site] : passes) {
        const int64_t conflicts = of_site.taken - of_site.needed;
        launch.shared_wavefronts += of_site.taken;
        launch.shared_conflicts += conflicts;
        if (conflicts) met.push_back({site, of_site.taken, conflicts});
    }
    std::sort(met.begin(), met.end(), [](const SimtConflict& a, const SimtConflict& b) {
        return a.conflicts != b.conflicts ? a.conflicts > b.conflicts : a.site < b.site;
    });
    launch.num_conflicts = int(std::min(met.size(), sizeof launch.conflicts / sizeof launch.conflicts[0]));
    std::copy_n(met.begin(), launch.num_conflicts, launch.conflicts);
}

void Executor::run_grid() {
    threads = make_threads();
    launch.shared_wavefronts = launch.shared_conflicts = launch.barriers = launch.mma = 0;
    place_tensors();
    const int64_t in_static = shared[1].bytes;
    if (in_static > launch.most_static || in_static + launch.shared_bytes > launch.most) {
        findings.add("refused launch", nullptr,
                     "%lld bytes of static and %lld of dynamic shared memory: expected at most %lld, and %lld of both",
                     (long long)in_static, (long long)launch.shared_bytes, (long long)launch.most_static, (long long)launch.most);
        aborted = true;
    }
    std::vector<char*> pointers;
    std::vector<void*> packed;
    for (Region& region : tensors) pointers.push_back(region.base);
    for (char*& pointer : pointers) packed.push_back(&pointer);
    for (int k = 0; k < launch.num_scalars; ++k) packed.push_back(launch.scalars[k]);
    arguments = packed.data();
    if (launch.resident && !aborted) run_together();
    for (block.z = 0; !launch.resident && block.z < launch.grid.z; ++block.z)
        for (block.y = 0; block.y < launch.grid.y; ++block.y)
            for (block.x = 0; block.x < launch.grid.x && !aborted; ++block.x) {
                ++block_number;
                run_block();
            }
    count_conflicts();
    for (int k = 0; !aborted && k < launch.num_tensors; ++k)
        if (launch.tensors[k].written_distinct)  // what is only read may lie in memory that cannot be written
            std::memcpy(launch.tensors[k].data, tensors[k].base, launch.tensors[k].bytes);
    if (arena && arena != MAP_FAILED) munmap(arena, arena_bytes);
}

}  // namespace simt

using simt::executor;

extern "C" {

int simt_launch(SimtLaunch* launch) {
    simt::Executor made(*launch);
    executor = &made;
    made.run_grid();
    executor = nullptr;
    return launch->num_findings;
}

SimtIndex simt_thread_index() { return executor->thread_index(executor->index()); }
SimtIndex simt_block_index() { return executor->block; }
void simt_barrier(int id, int count) { executor->barrier(id, count, SITE); }
void simt_warp(SimtOperation operation, SimtLane* lane) { executor->warp(operation, lane, SITE); }
void simt_copy_async(void* to, const void* from, int bytes, bool zero) {
    executor->copy_async({static_cast<char*>(to), static_cast<char*>(const_cast<void*>(from)), bytes, zero, SITE});
}
void simt_copy_commit() { executor->current->groups.emplace_back(); }
int simt_atomic(SimtAtomic operation, int* at, int value, int order) {
    return executor->atomic(simt::Atomic(operation), at, value, simt::Order(order), SITE);
}
void simt_fence() { executor->fence(); }
void simt_copy_wait(int pending) { executor->copy_wait(size_t(pending)); }

// What -fsanitize=thread calls.
#define SIMT_HOOK(BYTES)                                                                                             \
    void __tsan_read##BYTES(void* at) { executor->access(static_cast<char*>(at), BYTES, false, SITE); }              \
    void __tsan_write##BYTES(void* at) { executor->access(static_cast<char*>(at), BYTES, true, SITE); }              \
    void __tsan_unaligned_read##BYTES(void* at) { executor->access(static_cast<char*>(at), BYTES, false, SITE); }    \
    void __tsan_unaligned_write##BYTES(void* at) { executor->access(static_cast<char*>(at), BYTES, true, SITE); }
SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)
void __tsan_read_range(void* at, size_t bytes) { executor->access_range(static_cast<char*>(at), bytes, false, SITE); }
void __tsan_write_range(void* at, size_t bytes) { executor->access_range(static_cast<char*>(at), bytes, true, SITE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"

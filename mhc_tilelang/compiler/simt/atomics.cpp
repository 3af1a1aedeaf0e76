// Kernels that synchronise by atomics: blocks that are on the device together, in turns, and the order between them.
//
// `resident` blocks have threads, shared memory and its shadow at a time; another begins when one has ended, in the
// order that a seed gives. A block's turn lasts until one of its threads comes to an atomic: whoever polls lets all
// others go on. If nobody but pollers has done anything for long, they wait for what does not come.

#include <cstring>

#include "executor.h"

namespace simt {

constexpr int64_t IDLE_POLLS = 1000;  // of each block on the device: then nothing will come any more

// ---- order ----------------------------------------------------------------------------------------------------------

bool Executor::comes_after(const Touch& other) const {
    if (other.block == block_number) return ordered(current->clock, other.thread, other.step);
    if (!current->known) return false;
    const auto found = current->known->find(other.block);
    return found != current->known->end() && ordered(*found->second, other.thread, other.step);
}

Knowledge Executor::all_known() {
    Blocks all = current->known ? *current->known : Blocks();
    all[block_number] = std::make_shared<const Clock>(current->clock);
    ++current->clock[index()];
    return std::make_shared<const Blocks>(std::move(all));
}

void Executor::acquire(const Knowledge& given) {
    if (given) current->known = joined(current->known, given);
}

void Executor::fence() {
    acquire(current->read);
    current->read = nullptr;
    current->fenced = all_known();
}

void Executor::touch_between(int tensor, int64_t unit, bool write, bool atomic, const void* site) {
    const Touch now = {block_number, current->clock[index()], index(), atomic, write};
    const Touch* rival = tensors[tensor].between.touch(unit, now, [&](const Touch& other) { return comes_after(other); });
    if (!rival) return;
    const bool within = rival->block == block_number;
    findings.add(within ? "race" : "race between blocks", site, "%s %s byte %lld of %s, which thread %u of %s %s: no %s between orders them",
                 who(index()).c_str(), write ? "writes" : "reads", (long long)(unit * UNIT), launch.tensors[tensor].name,
                 rival->thread, within ? "the block" : ("block number " + std::to_string(rival->block - 1)).c_str(),
                 rival->write || !rival->atomic ? "touches" : "reads", within ? "barrier" : "release and acquire");
}

int Executor::atomic(Atomic operation, int* at, int value, Order order, const void* site) {
    char* byte = reinterpret_cast<char*>(at);
    const int tensor = tensor_at(byte);
    if (tensor < 0) out_of_bounds(byte, 4, operation != Atomic::LOAD, site);
    if (!launch.resident) {
        findings.add("unsupported access", site, "an atomic in a launch whose blocks run one after another");
        abort_launch();
    }
    const bool writes = operation != Atomic::LOAD, reads = operation != Atomic::STORE;
    const bool acquires = order == Order::ACQUIRE || order == Order::CONSUME || order >= Order::ACQ_REL;
    take_turns(!writes, site);
    for (int64_t unit = (byte - tensors[tensor].base) / UNIT, k = 0; k < 4 / UNIT; ++k)
        touch_between(tensor, unit + k, writes, true, site);
    Knowledge& there = released[at];
    if (reads && acquires) acquire(there);
    if (reads && !acquires) current->read = joined(current->read, there);
    if (writes) {
        const Knowledge mine = order >= Order::RELEASE ? all_known() : current->fenced;
        there = operation == Atomic::ADD ? joined(there, mine) : mine;
        launch.tensors[tensor].written_distinct += 4;  // so that it is copied back
    }
    const int before = *at;
    if (operation == Atomic::ADD) *at = before + value;
    if (operation == Atomic::STORE) *at = value;
    return before;
}

// ---- turns ----------------------------------------------------------------------------------------------------------

void Executor::take_turns(bool polls, const void* site) {
    idle = polls ? idle + 1 : 0;
    if (idle > IDLE_POLLS * int64_t(on_device.size())) {
        findings.add("deadlock", site, "%s waits at an atomic, and so does every block that is on the device, %zu of %u; %u have ended",
                     who(index()).c_str(), on_device.size(), number_of_blocks(), ended_blocks);
        abort_launch();
    }
    turn_over = true;
    yield();
}

void Executor::exchange(Block& with) {
    std::swap(threads, with.threads);
    std::swap(block, with.index);
    std::swap(block_number, with.number);
    for (int k = 0; k < 2; ++k) {
        Region& region = shared[k];
        std::swap(region.shadow, with.shared[k].shadow);
        std::swap(region.copying, with.shared[k].copying);
        with.memory[k].resize(region.bytes);
        std::swap_ranges(with.memory[k].begin(), with.memory[k].end(), region.base);
    }
    std::vector<Region*> regions = {&shared[0], &shared[1]};
    for (Region& region : tensors) regions.push_back(&region);
    with.accesses.resize(2 * regions.size());
    for (size_t k = 0; k < regions.size(); ++k) {
        std::swap(regions[k]->reads, with.accesses[2 * k]);
        std::swap(regions[k]->writes, with.accesses[2 * k + 1]);
    }
    for (Region* region : regions) {
        region->reads.resize((num_threads() + WARP - 1) / WARP);
        region->writes.resize((num_threads() + WARP - 1) / WARP);
    }
}

void Executor::run_together() {
    const uint32_t total = number_of_blocks();
    std::vector<uint32_t> order(total);
    for (uint32_t k = 0; k < total; ++k) order[k] = k;
    uint64_t state = launch.seed * 6364136223846793005ull + 1442695040888963407ull;
    const auto below = [&](uint64_t most) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return (state >> 33) % most;
    };
    if (launch.seed)
        for (uint32_t k = total; k > 1; --k) std::swap(order[k - 1], order[below(k)]);
    for (uint32_t begun = 0; !aborted && (begun < total || !on_device.empty());) {
        while (begun < total && on_device.size() < size_t(launch.resident)) {
            auto next = std::make_unique<Block>();
            const uint32_t at = order[begun++];
            next->index = {at % launch.grid.x, at / launch.grid.x % launch.grid.y, at / launch.grid.x / launch.grid.y};
            next->number = at + 1;
            next->threads = make_threads();
            exchange(*next);
            begin_block();
            exchange(*next);
            on_device.push_back(std::move(next));
        }
        if (launch.seed && on_device.size() > 1) std::swap(on_device.front(), on_device[below(on_device.size())]);
        std::unique_ptr<Block> turn = std::move(on_device.front());
        on_device.pop_front();
        on_device.push_back(nullptr);
        exchange(*turn);
        const bool ended = run_turn();
        if (ended) count_block(), ++ended_blocks, idle = 0;
        exchange(*turn);
        if (ended)
            on_device.pop_back();
        else
            on_device.back() = std::move(turn);
    }
}

}  // namespace simt

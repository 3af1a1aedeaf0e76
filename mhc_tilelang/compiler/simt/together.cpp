// What threads do together: meet at barriers, work as a warp, wait for copies.

#include <algorithm>
#include <cstring>

#include "executor.h"
#include "matrices.h"

namespace simt {

void Executor::meet(const std::vector<uint16_t>& those) {
    Clock joined(num_threads(), 0);
    Knowledge known;
    for (uint16_t t : those) {
        for (int u = 0; u < num_threads(); ++u) joined[u] = std::max(joined[u], threads[t].clock[u]);
        known = simt::joined(known, threads[t].known);
    }
    for (uint16_t t : those) {
        threads[t].clock = joined;
        threads[t].known = known;
        ++threads[t].clock[t];
        threads[t].state = State::READY;
    }
}

void Executor::barrier(int id, int count, const void* site) {
    const int expected = count ? count : num_threads();
    current->state = State::AT_BARRIER;
    current->barrier = id;
    current->expected = expected;
    current->site = site;
    if (id < 0 || id >= 16 || (count && expected % WARP) || expected > num_threads()) {
        findings.add("invalid barrier", site, "barrier %d for %d threads: expected 0 to 15, and whole warps of the block's %d",
                     id, expected, num_threads());
        abort_launch();
    }
    std::vector<uint16_t> come;
    int of_warp[1024 / WARP] = {};
    for (int t = 0; t < num_threads(); ++t)
        if (threads[t].state == State::AT_BARRIER && threads[t].barrier == id) {
            if (threads[t].expected != expected) {
                findings.add("divergent barrier", site, "barrier %d: %s waits for %d threads, %s for %d", id, who(index()).c_str(),
                             expected, who(uint16_t(t)).c_str(), threads[t].expected);
                abort_launch();
            }
            come.push_back(uint16_t(t));
            ++of_warp[t / WARP];
        }
    if (int(come.size()) < expected) return yield();
    for (uint16_t t : come)
        if (of_warp[t / WARP] != lanes_of(t / WARP) || threads[t].site != threads[t / WARP * WARP].site) {
            findings.add("divergent barrier", site, "barrier %d is met by a part of the warp of %s, or at different instructions",
                         id, who(t).c_str());
            abort_launch();
        }
    ++launch.barriers;
    meet(come);
}

void Executor::warp(SimtOperation operation, SimtLane* lane, const void* site) {
    const int first = index() / WARP * WARP;
    const int lanes_there = lanes_of(first / WARP);
    if (lanes_there < WARP && operation != SIMT_SYNCWARP) {
        findings.add("divergent warp", site, "the last warp has %d of 32 threads", lanes_there);
        abort_launch();
    }
    if (operation == SIMT_LDMATRIX && index() % WARP < 8 * lane->matrices) {
        char* row = static_cast<char*>(const_cast<void*>(lane->row));
        if (!shared_at(row)) {
            findings.add("shared out of bounds", site, "%s: ldmatrix from %p, which is not shared memory", who(index()).c_str(), lane->row);
            abort_launch();
        }
        access(row, 16, false, site);
    }
    current->state = State::IN_WARP;
    current->operation = operation;
    current->lane = lane;
    current->site = site;
    SimtLane* lanes[WARP];
    std::vector<uint16_t> all;
    for (int l = 0; l < lanes_there; ++l) {
        const Thread& other = threads[first + l];
        if (other.state != State::IN_WARP || other.operation != operation || other.site != site) return yield();
        lanes[l] = other.lane;
        all.push_back(uint16_t(first + l));
    }
    if (operation == SIMT_SHUFFLE) {
        uint32_t given[WARP];
        for (int l = 0; l < WARP; ++l) given[l] = lanes[l]->value;
        for (int l = 0; l < WARP; ++l) lanes[l]->value = given[l ^ lanes[l]->exclusive_or];
    } else if (operation == SIMT_LDMATRIX) {
        load_matrices(lanes);
    } else if (operation == SIMT_MMA) {
        multiply(lanes);
        ++launch.mma;
    }
    if (operation == SIMT_SYNCWARP) return meet(all);
    for (uint16_t t : all) threads[t].state = State::READY;  // no order for memory, as on a GPU
}

void Executor::copy_async(Copy copy) {
    Region* region = shared_at(copy.to);
    if (!region || copy.to + copy.bytes > region->base + region->bytes) out_of_bounds(copy.to, copy.bytes, true, copy.site);
    if (reinterpret_cast<uintptr_t>(copy.to) % copy.bytes) {
        findings.add("misaligned access", copy.site, "%s: cp.async of %d bytes to byte %lld of shared memory", who(index()).c_str(),
                     copy.bytes, (long long)(copy.to - region->base));
        abort_launch();
    }
    if (!copy.zero) {
        if (shared_at(copy.from)) {
            findings.add("global out of bounds", copy.site, "%s: cp.async from shared memory", who(index()).c_str());
            abort_launch();
        }
        if (tensor_at(copy.from) < 0) out_of_bounds(copy.from, copy.bytes, false, copy.site);
        access(copy.from, copy.bytes, false, copy.site);
    }
    touch_shared(*region, copy.to, copy.bytes, true, copy.site);  // it may land at once
    const int64_t unit = (copy.to - region->base) / UNIT;
    std::fill_n(region->copying.begin() + unit, copy.bytes / UNIT, uint16_t(index() + 1));
    current->groups.back().push_back(copy);
}

void Executor::copy_wait(size_t pending) {
    while (current->groups.size() - 1 > pending) {  // and not before: what nobody waits for is not there
        for (const Copy& copy : current->groups.front()) {
            Region& region = *shared_at(copy.to);
            const int64_t unit = (copy.to - region.base) / UNIT;
            std::fill_n(region.copying.begin() + unit, copy.bytes / UNIT, 0);
            touch_shared(region, copy.to, copy.bytes, true, copy.site, true);
            if (copy.zero)
                std::memset(copy.to, 0, copy.bytes);
            else
                std::memcpy(copy.to, copy.from, copy.bytes);
        }
        current->groups.pop_front();
    }
}

}  // namespace simt

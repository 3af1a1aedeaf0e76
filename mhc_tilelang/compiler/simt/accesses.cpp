// Loads and stores: bounds, alignment, order; then they are counted.

#include <algorithm>

#include "executor.h"

namespace simt {

void Executor::access(char* at, int bytes, bool write, const void* site) {
    if (on_stack(at)) return;
    Region* region = shared_at(at);
    const int tensor = region ? -1 : tensor_at(at);
    if (!region && tensor < 0) out_of_bounds(at, bytes, write, site);
    Region& touched = region ? *region : tensors[tensor];
    if (at + bytes > touched.base + touched.bytes) out_of_bounds(at, bytes, write, site);
    if (reinterpret_cast<uintptr_t>(at) % bytes) {
        findings.add("misaligned access", site, "%s %s %d bytes at byte %lld of %s, which is no multiple of %d",
                     who(index()).c_str(), write ? "writes" : "reads", bytes, (long long)(at - touched.base),
                     region ? "shared memory" : launch.tensors[tensor].name, bytes);
        abort_launch();
    }
    if (bytes < touched.unit) {
        findings.add("unsupported access", site, "a single byte is %s", write ? "written" : "read");
        abort_launch();
    }
    if (region)
        touch_shared(*region, at, bytes, write, site);
    else
        touch_tensor(tensor, at, bytes, write, site);
}

void Executor::out_of_bounds(const char* at, int bytes, bool write, const void* site) {
    const char* verb = write ? "writes" : "reads";
    const char* dynamic = shared[0].base;
    if (at >= dynamic - sizeof simt_shared_memory && at < dynamic + 2 * sizeof simt_shared_memory) {
        findings.add("shared out of bounds", site, "%s %s %d bytes at byte %lld of shared memory, of which there are %lld",
                     who(index()).c_str(), verb, bytes, (long long)(at - dynamic), (long long)shared[0].bytes);
    } else {
        int nearest = -1;
        int64_t least = int64_t(1) << 62, offset = 0;
        for (size_t k = 0; k < tensors.size(); ++k) {
            const int64_t beyond = at < tensors[k].base ? tensors[k].base - at : at - (tensors[k].base + tensors[k].bytes);
            if (std::max<int64_t>(beyond, 0) < least) {
                least = std::max<int64_t>(beyond, 0);
                nearest = int(k);
                offset = at - tensors[k].base;
            }
        }
        if (nearest < 0 || least >= int64_t(GAP))
            findings.add("global out of bounds", site, "%s %s %d bytes at %p, near no tensor", who(index()).c_str(), verb, bytes, (const void*)at);
        else
            findings.add("global out of bounds", site, "%s %s %d bytes at element %lld of %s, which has %lld", who(index()).c_str(), verb,
                         bytes, (long long)(offset / launch.tensors[nearest].element_bytes - (offset < 0)), launch.tensors[nearest].name,
                         (long long)(launch.tensors[nearest].bytes / launch.tensors[nearest].element_bytes));
    }
    abort_launch();
}

void Executor::race(const char* where, int64_t offset, uint16_t rival, bool write, const void* site) {
    const SimtIndex other = thread_index(rival);
    findings.add("race", site, "%s %s byte %lld of %s, and so does thread (%u, %u, %u) with no barrier between; one of them writes",
                 who(index()).c_str(), write ? "writes" : "reads", (long long)offset, where, other.x, other.y, other.z);
}

void Executor::touch_shared(Region& region, char* at, int bytes, bool write, const void* site, bool copied) {
    const int64_t offset = at - region.base;
    if (!copied) {
        auto& accesses = write ? region.writes : region.reads;
        accesses[index() / WARP].add(site, index() % WARP, uint64_t(offset), bytes);
    }
    for (int64_t unit = offset / UNIT; unit < (offset + bytes) / UNIT; ++unit) {
        if (region.copying[unit] && !copied) {
            findings.add("missing cp.async wait", site, "%s %s byte %lld of shared memory while the copy into it by thread %d is under way",
                         who(index()).c_str(), write ? "writes" : "reads", (long long)(unit * UNIT), region.copying[unit] - 1);
            continue;
        }
        if (!write && !region.shadow.at(unit).written())
            findings.add("uninitialized shared memory", site, "%s reads byte %lld of shared memory, which nothing wrote",
                         who(index()).c_str(), (long long)(unit * UNIT));
        const uint16_t rival = write ? region.shadow.write(unit, index(), current->clock) : region.shadow.read(unit, index(), current->clock);
        if (rival != NOBODY) race("shared memory", unit * UNIT, rival, write, site);
    }
}

void Executor::touch_tensor(int tensor, char* at, int bytes, bool write, const void* site) {
    Region& region = tensors[tensor];
    SimtTensor& counted = launch.tensors[tensor];
    const int64_t offset = at - region.base;
    (write ? counted.written_bytes : counted.read_bytes) += bytes;
    (write ? region.writes : region.reads)[index() / WARP].add(site, index() % WARP, reinterpret_cast<uint64_t>(at), bytes);
    if (launch.resident) {
        idle = write ? 0 : idle;
        for (int64_t unit = offset / UNIT; unit < (offset + bytes) / UNIT; ++unit) {
            if (!counted.read_only) touch_between(tensor, unit, write, false, site);
            (write ? counted.written_distinct : counted.read_distinct) += region.between.is_new(unit, write) ? UNIT : 0;
        }
        return;
    }
    for (int64_t unit = offset / region.unit; unit < (offset + bytes) / region.unit; ++unit) {
        uint32_t &writer = region.writer_block[unit], &reader = region.reader_block[unit];
        if (writer != block_number && reader != block_number) region.shadow.forget(unit);
        const bool others_wrote = writer && writer != block_number;
        const bool others_read = region.read_before[unit] || (reader && reader != block_number);
        if (others_wrote || (write && others_read))
            findings.add("race between blocks", site, "%s %s byte %lld of %s, which another block %s: blocks have no order",
                         who(index()).c_str(), write ? "writes" : "reads", (long long)(unit * region.unit), counted.name, others_wrote ? "wrote" : "read");
        if (write) {
            if (!writer) counted.written_distinct += region.unit;
            writer = block_number;
        } else {
            if (!reader) counted.read_distinct += region.unit;
            region.read_before[unit] = region.read_before[unit] || (reader && reader != block_number);
            reader = block_number;
        }
        const uint16_t rival = write ? region.shadow.write(unit, index(), current->clock) : region.shadow.read(unit, index(), current->clock);
        if (rival != NOBODY) race(counted.name, unit * region.unit, rival, write, site);
    }
}

}  // namespace simt

// Order between the blocks of a grid, for kernels that synchronise by atomics.
//
// Within a block a thread's clock says what it comes after (shadow.h). Of other blocks it knows what was released to it:
// a copy of a clock of each. An atomic that releases leaves at its address all that its thread knows; one that acquires
// takes it, and a barrier hands it to the other threads of the block. A fence makes the atomics after it release what
// was known there, and acquires what those before it read.

#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "shadow.h"

namespace simt {

using Known = std::shared_ptr<const Clock>;
using Blocks = std::map<uint32_t, Known>;  // by the block's number
using Knowledge = std::shared_ptr<const Blocks>;

inline Known later(const Known& one, const Known& other) {
    if (!one || one == other) return other;
    if (!other) return one;
    Clock joined(*one);
    for (size_t k = 0; k < joined.size(); ++k) joined[k] = std::max(joined[k], (*other)[k]);
    if (joined == *one) return one;
    return joined == *other ? other : std::make_shared<const Clock>(std::move(joined));
}

inline Knowledge joined(const Knowledge& one, const Knowledge& other) {
    if (!one || one == other) return other;
    if (!other) return one;
    Blocks all(*one);
    for (const auto& [block, clock] : *other) {
        Known& mine = all[block];
        mine = later(mine, clock);
    }
    return std::make_shared<const Blocks>(std::move(all));
}

// Who touched a unit of a tensor: one plain write, and what came after it.
struct Touch {
    uint32_t block, step;
    uint16_t thread;
    bool atomic, write;
};

class GridShadow {
  public:
    void reset(size_t units) {
        writers_.assign(units, Touch{0, 0, 0, false, false});
        others_.clear();
        read_.assign(units, false);
        written_.assign(units, false);
    }
    // Whether a unit is touched so for the first time.
    bool is_new(size_t unit, bool write) {
        std::vector<bool>& known = write ? written_ : read_;
        const bool found = !known[unit];
        known[unit] = true;
        return found;
    }

    // An earlier touch that conflicts with this one and that `ordered` does not put before it, if there is one.
    template <typename Ordered>
    const Touch* touch(size_t unit, const Touch& now, Ordered ordered) {
        Touch& writer = writers_[unit];
        const Touch* rival = writer.block && !ordered(writer) ? &writer : nullptr;
        std::vector<Touch>& others = others_[unit];
        for (const Touch& other : others)
            if ((other.write || now.write) && !(other.atomic && now.atomic) && !ordered(other)) rival = &other;
        if (rival) {
            found_ = *rival;
            rival = &found_;
        }
        if (now.write && !now.atomic) {
            writer = now;
            others.clear();
            return rival;
        }
        for (Touch& other : others)
            if (other.block == now.block && other.thread == now.thread && other.atomic == now.atomic) {
                other.step = now.step;
                other.write |= now.write;
                return rival;
            }
        others.push_back(now);
        return rival;
    }

  private:
    std::vector<Touch> writers_;
    std::vector<bool> read_, written_;
    std::unordered_map<size_t, std::vector<Touch>> others_;
    Touch found_;
};

}  // namespace simt

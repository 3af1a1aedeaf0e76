// What the accesses of a warp cost: 32-byte sectors of global memory, passes over the banks of shared memory.
//
// The lanes of a warp run one after another here, so their accesses are put together again: the k-th time that a lane
// comes to an instruction belongs to the k-th time that the others do.

#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace simt {

constexpr int WARP = 32;
constexpr int SECTOR_BYTES = 32, BANKS = 32, BANK_BYTES = 4, PASS_BYTES = BANKS * BANK_BYTES;

struct Access {
    uint64_t address;
    uint8_t bytes, lane;
};

class WarpAccesses {
  public:
    void add(const void* site, int lane, uint64_t address, int bytes) {
        Site& at = sites_[site];
        const size_t turn = at.turns[lane]++;
        if (turn >= at.accesses.size()) at.accesses.resize(turn + 1);
        at.accesses[turn].push_back({address, uint8_t(bytes), uint8_t(lane)});
    }

    template <typename Visit>
    void drain(Visit visit) {
        for (auto& site : sites_)
            for (const std::vector<Access>& together : site.second.accesses) visit(site.first, together);
        sites_.clear();
    }

  private:
    struct Site {
        uint32_t turns[WARP] = {};
        std::vector<std::vector<Access>> accesses;
    };
    std::unordered_map<const void*, Site> sites_;
};

inline int64_t sectors_of(const std::vector<Access>& together) {
    std::vector<uint64_t> sectors;
    for (const Access& access : together)
        for (uint64_t s = access.address / SECTOR_BYTES; s <= (access.address + access.bytes - 1) / SECTOR_BYTES; ++s)
            sectors.push_back(s);
    std::sort(sectors.begin(), sectors.end());
    return std::unique(sectors.begin(), sectors.end()) - sectors.begin();
}

// Wide accesses go a half or a quarter of the warp at a time; within one, a bank gives one word a pass.
struct Passes {
    int64_t taken = 0, needed = 0;
};
inline Passes passes_of(const std::vector<Access>& together) {
    const int at_once = PASS_BYTES / std::max(BANK_BYTES, int(together[0].bytes));
    std::vector<uint64_t> words[WARP];  // by group of lanes
    for (const Access& access : together)
        for (uint64_t w = access.address / BANK_BYTES; w <= (access.address + access.bytes - 1) / BANK_BYTES; ++w)
            words[access.lane / at_once].push_back(w);
    Passes passes;
    for (std::vector<uint64_t>& group : words) {
        std::sort(group.begin(), group.end());
        group.erase(std::unique(group.begin(), group.end()), group.end());
        int64_t of_bank[BANKS] = {}, most = 0;
        for (uint64_t word : group) most = std::max(most, ++of_bank[word % BANKS]);
        passes.taken += most;
        passes.needed += !group.empty();
    }
    return passes;
}

}  // namespace simt

// Who touched which memory last: finds races, and shared memory that is read before it is written.
//
// Happens-before by vector clocks. clock[t][u] is the last step of thread u that thread t is known to come after; a
// barrier makes every thread that meets there know all that any of them knew, and begin a new step. An access is
// ordered after an earlier one by thread u in step c exactly if clock[t][u] >= c. Two accesses to the same element of
// which one writes and neither is ordered after the other are a race. (The scheme is FastTrack's, Flanagan and Freund,
// PLDI 2009: the last write as one thread and step, reads as one until two are unordered, then as a set.)
//
// Memory is watched in units of two bytes, tensors of single bytes byte by byte.

#pragma once

#include <cstdint>
#include <vector>

namespace simt {

constexpr int UNIT = 2;
constexpr uint16_t NOBODY = 0xFFFF;

using Clock = std::vector<uint32_t>;

struct Step {
    uint16_t thread;
    uint32_t step;
};

inline bool ordered(const Clock& now, uint16_t thread, uint32_t step) { return now[thread] >= step; }

// One unit of memory.
struct Unit {
    uint16_t writer = NOBODY, reader = NOBODY;
    uint32_t write_step = 0, read_step = 0;
    uint32_t reads = 0;  // index + 1 of the set of reads, once there are several

    bool written() const { return writer != NOBODY; }
};

class Shadow {
  public:
    void reset(size_t num_units) {
        units_.assign(num_units, Unit());
        reads_.clear();
    }
    void new_block() { reads_.clear(); }  // units are forgotten one by one, when they are touched again
    void forget(size_t unit) { units_[unit] = Unit(); }
    const Unit& at(size_t unit) const { return units_[unit]; }

    // The thread whose earlier access races with this one, or NOBODY. The access is remembered.
    uint16_t read(size_t index, uint16_t thread, const Clock& now) {
        Unit& unit = units_[index];
        const uint16_t rival = unit.written() && !ordered(now, unit.writer, unit.write_step) ? unit.writer : NOBODY;
        if (unit.reads) {
            for (Step& known : reads_[unit.reads - 1])
                if (known.thread == thread) {
                    known.step = now[thread];
                    return rival;
                }
            reads_[unit.reads - 1].push_back({thread, now[thread]});
        } else if (unit.reader == NOBODY || ordered(now, unit.reader, unit.read_step)) {
            unit.reader = thread;
            unit.read_step = now[thread];
        } else {
            reads_.push_back({{unit.reader, unit.read_step}, {thread, now[thread]}});
            unit.reads = uint32_t(reads_.size());
        }
        return rival;
    }

    uint16_t write(size_t index, uint16_t thread, const Clock& now) {
        Unit& unit = units_[index];
        uint16_t rival = NOBODY;
        if (unit.written() && !ordered(now, unit.writer, unit.write_step)) rival = unit.writer;
        if (unit.reader != NOBODY && !ordered(now, unit.reader, unit.read_step)) rival = unit.reader;
        if (unit.reads)
            for (const Step& known : reads_[unit.reads - 1])
                if (!ordered(now, known.thread, known.step)) rival = known.thread;
        unit = Unit();
        unit.writer = thread;
        unit.write_step = now[thread];
        return rival;
    }

  private:
    std::vector<Unit> units_;
    std::vector<std::vector<Step>> reads_;
};

}  // namespace simt

// What went wrong in a launch: kinds, where, how often.

#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "interface.h"

namespace simt {

class Findings {
  public:
    explicit Findings(SimtLaunch& launch) : launch_(launch) { launch.num_findings = launch.left_out = 0; }

    // One line for each kind and instruction; what comes again is counted.
    __attribute__((format(printf, 4, 5))) void add(const char* kind, const void* site, const char* format, ...) {
        for (int k = 0; k < launch_.num_findings; ++k) {
            SimtFinding& known = launch_.findings[k];
            if (known.site == site && std::strcmp(known.kind, kind) == 0) {
                ++known.times;
                return;
            }
        }
        const int most = sizeof launch_.findings / sizeof launch_.findings[0];
        if (launch_.num_findings == most) {  // the last one may be what ended the launch: it takes another's place
            ++launch_.left_out;
            --launch_.num_findings;
        }
        SimtFinding& finding = launch_.findings[launch_.num_findings++];
        std::snprintf(finding.kind, sizeof finding.kind, "%s", kind);
        std::va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(finding.text, sizeof finding.text, format, arguments);
        va_end(arguments);
        finding.times = 1;
        finding.site = site;
    }

  private:
    SimtLaunch& launch_;
};

}  // namespace simt

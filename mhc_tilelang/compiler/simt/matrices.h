// What a warp does as one: ldmatrix and mma.sync, with the lanes' fragments as the PTX manual draws them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "interface.h"

namespace simt {

// Lane 8·m + r holds the address of row r of matrix m, 8 × 8 of 16 bits. Lane l gets elements 2·(l % 4) and the one
// after it of row l / 4; transposed, of column l / 4.
inline void load_matrices(SimtLane* const lanes[32]) {
    for (int m = 0; m < lanes[0]->matrices; ++m)
        for (int l = 0; l < 32; ++l) {
            uint16_t pair[2];
            for (int e = 0; e < 2; ++e) {
                const int row = lanes[0]->transposed ? 2 * (l % 4) + e : l / 4;
                const int column = lanes[0]->transposed ? l / 4 : 2 * (l % 4) + e;
                std::memcpy(&pair[e], static_cast<const uint16_t*>(lanes[8 * m + row]->row) + column, 2);
            }
            std::memcpy(lanes[l]->out + m, pair, 4);
        }
}

inline double value_of(uint32_t bits, SimtOperand operand) {
    float value;
    if (operand == SIMT_FLOAT16) {
        const int exponent = bits >> 10 & 31, fraction = bits & 0x3FF;
        const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                           : std::ldexp(exponent ? fraction + 0x400 : fraction, (exponent ? exponent : 1) - 25);
        return bits & 0x8000 ? -size : size;
    }
    bits = operand == SIMT_BFLOAT16 ? bits << 16 : bits & 0xFFFFE000;  // the tensor core reads 19 bits of TF32
    std::memcpy(&value, &bits, 4);
    return value;
}

// Element (row, k) of a fragment A, 16 × K, and (k, column) of a fragment B, K × 8. `pack` elements share a register.
inline double element_of(const uint32_t* registers, int of_register, int within, SimtOperand operand) {
    const uint32_t bits = registers[of_register];
    return value_of(operand == SIMT_TFLOAT32 ? bits : bits >> (16 * within) & 0xFFFF, operand);
}

// D = A·B + C, m16n8k16 of 16-bit operands or m16n8k8 of TF32. Products are exact; their sum with c is rounded once
// (a tensor core aligns and cuts the terms instead: its last bits differ).
inline void multiply(SimtLane* const lanes[32]) {
    const SimtOperand operand = lanes[0]->operand;
    const int pack = operand == SIMT_TFLOAT32 ? 1 : 2, depth = 8 * pack;
    double a[16][16], b[16][8];
    for (int k = 0; k < depth; ++k) {
        const int lane = k / pack % 4, half = k / (4 * pack), within = k % pack;
        for (int row = 0; row < 16; ++row)
            a[row][k] = element_of(lanes[row % 8 * 4 + lane]->a, row / 8 + 2 * half, within, operand);
        for (int column = 0; column < 8; ++column)
            b[k][column] = element_of(lanes[column * 4 + lane]->b, half, within, operand);
    }
    for (int l = 0; l < 32; ++l)
        for (int e = 0; e < 4; ++e) {
            const int row = l / 4 + 8 * (e / 2), column = 2 * (l % 4) + e % 2;
            double sum = lanes[l]->c[e];
            for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
            lanes[l]->c[e] = float(sum);
        }
}

}  // namespace simt

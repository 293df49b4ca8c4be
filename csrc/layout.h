/* SPDX-License-Identifier: MIT */
/* P16, the packed layout, as one table: which fields of a GGUF block go where (docs/formats.md). */
#ifndef PHI3C_LAYOUT_H
#define PHI3C_LAYOUT_H

#include <stdint.h>

/* How a field of 16 rows is interleaved; `count` counts elements per row. */
enum phi3c_field_kind {
    FIELD_U8,        /* [count][16 rows] bytes */
    FIELD_U16,       /* [count][16 rows] halves */
    FIELD_U32,       /* [count][16 rows][4] bytes, count is even: four columns a lane */
    FIELD_S32,       /* the same, each byte's sign bit flipped: int8 becomes uint8 with a bias of 128 */
    FIELD_BIT32,     /* 32 bits; bit 4 g + i becomes bit g of byte i, so that a shift by g serves columns 4 g + i */
    FIELD_SCALE_MIN, /* q4_K's 12 bytes: 8 scales and 8 mins of 6 bits, in two bit planes of 128 and 64 bytes */
    FIELD_SCALE,     /* q3_K's 12 bytes: 16 scales of 6 bits, in the same two planes: [12][16 rows] as they are */
};

typedef struct {
    uint8_t kind, offset, count; /* offset in the GGUF block */
} phi3c_field;

typedef struct {
    int16_t columns, bytes; /* of a GGUF block */
    int16_t blocks;         /* per super-block of 256 columns; a short last one has fewer */
    phi3c_field fields[6];  /* in packed order, ended by count 0 */
} phi3c_layout;

extern const phi3c_layout phi3c_layouts[];

#endif

/* Golden vectors of a bundle: reads golden/TARGET/index.txt and the arrays in golden/vectors.npz, compares results.

   Plain C11, no globals. An array's bytes lie at its offset in the file: nothing in it is compressed. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { GOLDEN_NAME = 128, GOLDEN_BUFFERS = 32, GOLDEN_NUMBERS = 16 };

struct golden_buffer {
  char name[GOLDEN_NAME], dtype[GOLDEN_NAME], role[GOLDEN_NAME];
  size_t elements, bytes; /* of the buffer */
  long offset;
  size_t step; /* of an output, elements 0, step, 2 step, … are expected values */
  double atol, rtol;
  void *content; /* an input's values or an output's expected ones; NULL for an unused buffer */
};

struct golden_vector {
  char kernel[GOLDEN_NAME];
  int num_buffers, num_numbers;
  struct golden_buffer buffers[GOLDEN_BUFFERS];
  char number_names[GOLDEN_NUMBERS][GOLDEN_NAME];
  double numbers[GOLDEN_NUMBERS];
};

/* Open BUNDLE/golden/TARGET/index.txt; how many vectors it has, or -1 after a message on stderr. */
int golden_open(const char *bundle, const char *target, FILE **index);

/* Read the next vector and its arrays. 0, or -1 after a message on stderr. `golden_free` it in either case. */
int golden_next(FILE *index, const char *bundle, struct golden_vector *vector);
void golden_free(struct golden_vector *vector);

/* The number of a name; -1 after a message where the vector has none. */
int golden_number(const struct golden_vector *vector, const char *name, double *value);

/* The largest share of its tolerance that an element of `got`, the whole buffer, takes, 1 being the limit; infinite
   for a NaN anywhere. */
double golden_share(const struct golden_buffer *expected, const void *got);

/* The k-th of the words in `words`, copied to `word`, which has GOLDEN_NAME bytes. */
void golden_word(const char *words, int k, char *word);

#ifdef __cplusplus
}
#endif

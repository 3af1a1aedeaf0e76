#include "golden.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PATH = 4096 };

int golden_open(const char *bundle, const char *target, FILE **index) {
  char path[PATH];
  int format = 0, count = -1;
  snprintf(path, sizeof(path), "%s/golden/%s/index.txt", bundle, target);
  *index = fopen(path, "r");
  if (!*index) {
    fprintf(stderr, "%s: expected the index of golden vectors, got no such file\n", path);
    return -1;
  }
  if (fscanf(*index, "mhc-golden %d %d", &format, &count) != 2 || format != 2) {
    fprintf(stderr, "%s: expected mhc-golden 2, got format %d\n", path, format);
    return -1;
  }
  return count;
}

static size_t size_of(const char *dtype) { return strcmp(dtype, "float32") == 0 ? 4 : 2; }

static int read_array(const char *bundle, struct golden_buffer *buffer) {
  char path[PATH];
  const size_t size = size_of(buffer->dtype);
  buffer->bytes = buffer->elements * size;
  if (strcmp(buffer->role, "unused") == 0) return 0;
  if (buffer->step < 1) {
    fprintf(stderr, "%s: expected a step of 1 or more, got %zu\n", buffer->name, buffer->step);
    return -1;
  }
  const size_t kept = (buffer->elements + buffer->step - 1) / buffer->step;
  snprintf(path, sizeof(path), "%s/golden/vectors.npz", bundle);
  FILE *file = fopen(path, "rb");
  if (!file) {
    fprintf(stderr, "%s: expected the arrays of the golden vectors, got no such file\n", path);
    return -1;
  }
  buffer->content = malloc(kept * size + 1);
  const size_t got =
      buffer->content && fseek(file, buffer->offset, SEEK_SET) == 0 ? fread(buffer->content, size, kept, file) : 0;
  fclose(file);
  if (got == kept) return 0;
  fprintf(stderr, "%s: expected %zu elements of %s at %ld, got %zu\n", path, kept, buffer->name, buffer->offset, got);
  return -1;
}

int golden_next(FILE *index, const char *bundle, struct golden_vector *vector) {
  memset(vector, 0, sizeof(*vector));
  int buffers = 0, numbers = 0;
  if (fscanf(index, " kernel %127s %d %d", vector->kernel, &buffers, &numbers) != 3 || buffers < 0 ||
      buffers > GOLDEN_BUFFERS || numbers < 0 || numbers > GOLDEN_NUMBERS) {
    fprintf(stderr, "golden vectors: expected a kernel after %s, got something else\n", vector->kernel);
    return -1;
  }
  for (int k = 0; k < numbers; ++k) {
    if (fscanf(index, " number %127s %lf", vector->number_names[k], &vector->numbers[k]) != 2) return -1;
    vector->num_numbers = k + 1;
  }
  for (int k = 0; k < buffers; ++k) {
    struct golden_buffer *b = &vector->buffers[k];
    if (fscanf(index, " buffer %127s %127s %127s %zu %ld %zu %lf %lf", b->name, b->dtype, b->role, &b->elements,
               &b->offset, &b->step, &b->atol, &b->rtol) != 8)
      return -1;
    vector->num_buffers = k + 1;
    if (read_array(bundle, b) != 0) return -1;
  }
  return 0;
}

void golden_free(struct golden_vector *vector) {
  for (int k = 0; k < vector->num_buffers; ++k) free(vector->buffers[k].content);
  vector->num_buffers = 0;
}

int golden_number(const struct golden_vector *vector, const char *name, double *value) {
  for (int k = 0; k < vector->num_numbers; ++k)
    if (strcmp(vector->number_names[k], name) == 0) {
      *value = vector->numbers[k];
      return 0;
    }
  fprintf(stderr, "%s: expected a number %s, got none\n", vector->kernel, name);
  return -1;
}

static double value_at(const char *dtype, const void *content, size_t k) {
  if (strcmp(dtype, "float32") == 0) return ((const float *)content)[k];
  const uint32_t bits = ((const uint16_t *)content)[k];
  if (strcmp(dtype, "bfloat16") == 0) {
    const uint32_t word = bits << 16;
    float value;
    memcpy(&value, &word, sizeof(value));
    return value;
  }
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023; /* float16 */
  double value = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return bits & 0x8000u ? -value : value;
}

double golden_share(const struct golden_buffer *expected, const void *got) {
  double worst = 0;
  for (size_t k = 0; k < expected->elements; ++k) {
    const double value = value_at(expected->dtype, got, k);
    if (isnan(value)) return INFINITY;
    if (k % expected->step != 0) continue;
    const double wanted = value_at(expected->dtype, expected->content, k / expected->step);
    const double distance = fabs(value - wanted), tolerance = expected->atol + expected->rtol * fabs(wanted);
    if (distance == 0) continue;
    const double share = isfinite(value) && tolerance > 0 ? distance / tolerance : INFINITY;
    if (share > worst) worst = share;
  }
  return worst;
}

void golden_word(const char *words, int k, char *word) {
  while (k-- > 0) {
    words = strchr(words, ' ');
    if (!words++) {
      word[0] = 0;
      return;
    }
  }
  size_t length = strcspn(words, " ");
  if (length >= GOLDEN_NAME) length = GOLDEN_NAME - 1;
  memcpy(word, words, length);
  word[length] = 0;
}

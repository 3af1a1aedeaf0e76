/* Runs every CPU kernel of a bundle on its golden vectors: mhc_golden BUNDLE [THREADS].

   Exit status: 0 when all agree, 1 when one does not, 2 when the bundle cannot be read. */
#include <stdlib.h>
#include <string.h>

#include "golden.h"
#include "mhc_table.h"

static const struct mhc_entry *find(const char *name) {
  for (size_t k = 0; k < mhc_num_entries; ++k)
    if (strcmp(mhc_entries[k].name, name) == 0) return &mhc_entries[k];
  return NULL;
}

/* Calls the kernel with outputs full of NaN, and prints a line per output. 0, 1 or 2 as the exit status. */
static int run(const struct golden_vector *vector, int threads) {
  const struct mhc_entry *entry = find(vector->kernel);
  if (!entry || entry->num_buffers != vector->num_buffers || entry->num_numbers != vector->num_numbers) {
    fprintf(stderr, "%s: expected a kernel of mhc_table.h with %d buffers and %d numbers, got %s\n", vector->kernel,
            vector->num_buffers, vector->num_numbers, entry ? "another" : "none");
    return 2;
  }
  void *buffers[GOLDEN_BUFFERS] = {0};
  double numbers[GOLDEN_NUMBERS] = {0};
  char name[GOLDEN_NAME];
  int status = 0;
  for (int k = 0; k < entry->num_numbers; ++k) {
    golden_word(entry->numbers, k, name);
    if (golden_number(vector, name, &numbers[k]) != 0) return 2;
  }
  for (int k = 0; k < vector->num_buffers; ++k) {
    const struct golden_buffer *b = &vector->buffers[k];
    buffers[k] = malloc(b->bytes);
    if (!buffers[k]) status = 2;
    else if (strcmp(b->role, "in") == 0) memcpy(buffers[k], b->content, b->bytes);
    else memset(buffers[k], 0xff, b->bytes); /* NaN in every dtype: what stays unwritten shows */
  }
  if (status == 0) entry->call(buffers, numbers, threads);
  for (int k = 0; k < vector->num_buffers; ++k) {
    if (status != 2 && strcmp(vector->buffers[k].role, "out") == 0) {
      const double share = golden_share(&vector->buffers[k], buffers[k]);
      printf("%-60s %-16s %8.3f of the tolerance%s\n", vector->kernel, vector->buffers[k].name, share,
             share <= 1 ? "" : "  WRONG");
      if (!(share <= 1)) status = 1;
    }
    free(buffers[k]);
  }
  return status;
}

int main(int argc, char **argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: %s BUNDLE [THREADS]\n", argv[0]);
    return 2;
  }
  const int threads = argc > 2 ? atoi(argv[2]) : 1;
  struct golden_vector *vector = malloc(sizeof(*vector));
  FILE *index = NULL;
  const int count = golden_open(argv[1], "cpu", &index);
  int worst = count < 0 || !vector ? 2 : 0;
  for (int k = 0; k < count && worst < 2; ++k) {
    int status = golden_next(index, argv[1], vector) == 0 ? run(vector, threads < 1 ? 1 : threads) : 2;
    golden_free(vector);
    if (status > worst) worst = status;
  }
  if (worst < 2) printf("%d kernels: %s\n", count, worst ? "WRONG" : "all within their tolerance");
  if (index) fclose(index);
  free(vector);
  return worst;
}

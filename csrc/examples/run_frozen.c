/* Runs a frozen network on a batch from a file of float32, and writes the results as such a file:
 *
 *   run_frozen network.frozen images.bin results.bin
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "sparsekd.h"

static void print(const char* what, const sparsekd_tensor* tensor) {
  printf("%s: [batch", what);
  for (int32_t i = 0; i < tensor->axes; ++i) printf(", %" PRId64, tensor->shape[i]);
  printf("] float32\n");
}

/* Reads as many whole images as the file has. */
static float* read_images(const char* path, int64_t length, int64_t* batch) {
  FILE* file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) return NULL;
  const long bytes = ftell(file);
  const size_t image = (size_t)length * sizeof(float);
  if (bytes < 0 || (size_t)bytes % image) return fclose(file), NULL;
  *batch = (int64_t)((size_t)bytes / image);
  rewind(file);
  float* images = malloc((size_t)bytes + 1);
  if (images && fread(images, 1, (size_t)bytes, file) != (size_t)bytes) free(images), images = NULL;
  fclose(file);
  return images;
}

int main(int argc, char** argv) {
  if (argc != 4) return fprintf(stderr, "usage: %s NETWORK IMAGES RESULTS\n", argv[0]), 2;
  sparsekd_network* network = sparsekd_load(argv[1]);
  sparsekd_tensor in, out;
  if (!network || sparsekd_input(network, 0, &in) || sparsekd_output(network, 0, &out))
    return fprintf(stderr, "%s\n", sparsekd_error()), 1;
  if (sparsekd_inputs(network) != 1) return fprintf(stderr, "expected a network of one input\n"), 1;
  print("input", &in);
  print("output", &out);

  int64_t batch = 0;
  float* images = read_images(argv[2], in.length, &batch);
  if (!images) return fprintf(stderr, "%s: expected whole images of float32\n", argv[2]), 1;
  const size_t count = (size_t)(batch * out.length);
  float* results = malloc(count * sizeof(float) + 1);
  if (!results) return fprintf(stderr, "out of memory\n"), 1;
  const float* inputs[] = {images};
  float* outputs[] = {results};
  if (sparsekd_run(network, inputs, outputs, batch, 1)) return fprintf(stderr, "%s\n", sparsekd_error()), 1;

  FILE* file = fopen(argv[3], "wb");
  if (!file || fwrite(results, sizeof(float), count, file) != count || fclose(file))
    return fprintf(stderr, "%s: cannot be written\n", argv[3]), 1;
  printf("%" PRId64 " images\n", batch);
  free(results);
  free(images);
  sparsekd_free(network);
  return 0;
}

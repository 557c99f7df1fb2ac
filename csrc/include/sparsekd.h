/* Inference with networks that sparsekd has frozen and saved: plain C, without Python or torch.
 *
 *   sparsekd_network* network = sparsekd_load("network.frozen");
 *   if (!network) fprintf(stderr, "%s\n", sparsekd_error());
 *
 * A file is checked as a whole when it is loaded, so it may come from anywhere: a damaged one is an error and
 * nothing else. Examples: csrc/examples/run_frozen.c; docs/guides/inference.md tells how to build and link.
 */
#ifndef SPARSEKD_H
#define SPARSEKD_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define SPARSEKD_API
#else
#define SPARSEKD_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sparsekd_network sparsekd_network;

enum { SPARSEKD_FLOAT32 = 0 };

/* An input or an output, of one image: a batch has one more axis in front. Batches are contiguous. */
typedef struct {
  int32_t dtype; /* SPARSEKD_FLOAT32 */
  int32_t axes;
  const int64_t* shape; /* [axes], valid until the network is freed */
  int64_t length;       /* numbers of an image, the product of the shape */
} sparsekd_tensor;

/* What went wrong in the last call of this thread that failed, in one line; "" if none has. Valid until the
 * next call that fails. */
SPARSEKD_API const char* sparsekd_error(void);

/* A network from a file that skd.save_frozen wrote, or from its bytes, which are not needed afterwards. NULL
 * if it cannot be read, is damaged, or is no such file. Free it with sparsekd_free. */
SPARSEKD_API sparsekd_network* sparsekd_load(const char* path);
SPARSEKD_API sparsekd_network* sparsekd_load_bytes(const void* bytes, size_t size);

/* Does nothing with NULL. */
SPARSEKD_API void sparsekd_free(sparsekd_network* network);

/* How many there are; -1 if network is NULL. */
SPARSEKD_API int sparsekd_inputs(const sparsekd_network* network);
SPARSEKD_API int sparsekd_outputs(const sparsekd_network* network);

/* Describes input or output `index`. 0, or -1 if there is no such one. */
SPARSEKD_API int sparsekd_input(const sparsekd_network* network, int index, sparsekd_tensor* tensor);
SPARSEKD_API int sparsekd_output(const sparsekd_network* network, int index, sparsekd_tensor* tensor);

/* Computes `batch` images on at most `threads` threads. inputs[i] points to batch * length numbers of input
 * i, outputs[i] to room for those of output i; none of them may overlap. Any number of threads may call at
 * once with one network. 0, or -1 if an argument is wrong or memory is short. */
SPARSEKD_API int sparsekd_run(const sparsekd_network* network, const float* const* inputs,
                              float* const* outputs, int64_t batch, int threads);

#ifdef __cplusplus
}
#endif

#endif

/* The few functions of libamdhip64.so that compiled HIP code calls, for machines without a GPU: a launch is handed to
 * a function that Python sets, which executes the machine code on the virtual GPU.
 *
 * Loaded with RTLD_GLOBAL before the library whose kernels it registers; never on a machine whose HIP is real. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    uint32_t x, y, z;
} dim3_t;

/* What clang puts into the binary for each object with kernels. */
typedef struct {
    uint32_t magic, version;
    const void* bundle;
    void* unused;
} fat_binary_t;

typedef struct {
    const void* host; /* address of the kernel's stub, by which it is launched */
    const char* name;
    const void* bundle;
} kernel_t;

/* Returns a hipError_t: 0 for success. */
typedef int (*on_launch_t)(const void* bundle,
                           const char* name,
                           const dim3_t* grid,
                           const dim3_t* block,
                           void** arguments,
                           size_t lds_bytes);

enum { HIP_SUCCESS = 0, HIP_INVALID_VALUE = 1, HIP_OUT_OF_MEMORY = 2, HIP_INVALID_DEVICE_FUNCTION = 98, HIP_NO_DEVICE = 100 };

static kernel_t* kernels;
static size_t count, capacity;
static on_launch_t on_launch;
static int last_error = HIP_SUCCESS;
static __thread struct {
    dim3_t grid, block;
    size_t lds_bytes;
    void* stream;
} configuration;

void flash_ck_on_launch(on_launch_t function) { on_launch = function; }

void** __hipRegisterFatBinary(const void* wrapper)
{
    const void** handle = malloc(sizeof(*handle));
    if(handle)
        *handle = ((const fat_binary_t*)wrapper)->bundle;
    return (void**)handle;
}

void __hipUnregisterFatBinary(void** handle) { free(handle); }

void __hipRegisterFunction(void** handle,
                           const void* host,
                           char* device,
                           const char* name,
                           unsigned int threads,
                           void* thread,
                           void* block,
                           void* block_dim,
                           void* grid_dim,
                           int* warp_size)
{
    (void)device, (void)threads, (void)thread, (void)block, (void)block_dim, (void)grid_dim, (void)warp_size;
    if(!handle)
        return;
    if(count == capacity)
    {
        size_t wanted  = capacity ? 2 * capacity : 64;
        kernel_t* more = realloc(kernels, wanted * sizeof(*more));
        if(!more)
            return; /* launching it will say that it is not known */
        kernels  = more;
        capacity = wanted;
    }
    kernels[count++] = (kernel_t){host, name, *(const void**)handle};
}

int __hipPushCallConfiguration(dim3_t grid, dim3_t block, size_t lds_bytes, void* stream)
{
    configuration.grid      = grid;
    configuration.block     = block;
    configuration.lds_bytes = lds_bytes;
    configuration.stream    = stream;
    return HIP_SUCCESS;
}

int __hipPopCallConfiguration(dim3_t* grid, dim3_t* block, size_t* lds_bytes, void** stream)
{
    *grid      = configuration.grid;
    *block     = configuration.block;
    *lds_bytes = configuration.lds_bytes;
    *stream    = configuration.stream;
    return HIP_SUCCESS;
}

int hipLaunchKernel(const void* host, dim3_t grid, dim3_t block, void** arguments, size_t lds_bytes, void* stream)
{
    (void)stream;
    last_error = on_launch ? HIP_INVALID_DEVICE_FUNCTION : HIP_NO_DEVICE;
    for(size_t i = 0; on_launch && i < count; i++)
        if(kernels[i].host == host)
        {
            last_error = on_launch(kernels[i].bundle, kernels[i].name, &grid, &block, arguments, lds_bytes);
            break;
        }
    return last_error;
}

int hipPeekAtLastError(void) { return last_error; }

int hipGetLastError(void)
{
    int error  = last_error;
    last_error = HIP_SUCCESS;
    return error;
}

const char* hipGetErrorString(int error) { return error ? "an error of the virtual GPU" : "no error"; }

// All kernels, and one function that launches any of them.
#include "fibers.hpp"
using std::fmaf, std::fmax;
#include SOURCE

static void (*kernel_of_launch)(Task);
static const Task* task_of_launch;

extern "C" void launch(void (*kernel)(Task), unsigned blocks, unsigned threads, const Task* task) {
    const std::lock_guard alone(fibers::launching);
    kernel_of_launch = kernel, task_of_launch = task;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        fibers::run(threads, [] { kernel_of_launch(*task_of_launch); });
}

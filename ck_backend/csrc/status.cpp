// The texts of what the checks before a launch find.
#include "flash_ck.h"

namespace flash_ck {

std::string status_text(Status status)
{
    if(const int error = static_cast<int>(status) - static_cast<int>(Status::driver_error); error >= 0)
        return "the driver did not launch the kernel, error " + std::to_string(error) +
               ", which may be that of an earlier one. Hint: AMD_SERIALIZE_KERNEL=3 (HIP) or CUDA_LAUNCH_BLOCKING=1 "
               "shows whose it is";
    switch(status)
    {
    case Status::ok: return "it ran";
    case Status::no_instance: return "there is no instance of this number";
    case Status::wrong_kernel: return "the instance is one of another kernel";
    case Status::wrong_layout: return "the instance is for sequences with, the call without cu_seqlens, or the reverse";
    case Status::wrong_headdim: return "the head dim is not one that the instance takes";
    case Status::stride_too_large: return "a stride of Composable Kernel is a 32-bit number, one of this call is larger";
    case Status::driver_error: break;
    case Status::wrong_size: return "a size is negative, too large, or not that of its partner";
    case Status::missing_tensor: return "a tensor that the kernel needs is not there";
    case Status::wrong_table: return "it was compiled for another version of the library";
    case Status::too_many_tables: return "no more instances can be added";
    }
    return "unknown status";
}

} // namespace flash_ck

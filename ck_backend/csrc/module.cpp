// The entry of a library that has instances alone, which the operators of another one launch.
#include "flash_ck.h"

extern "C" __attribute__((visibility("default"))) const flash_ck::Table* flash_ck_table()
{
    static const flash_ck::Table table{flash_ck::kLayout, flash_ck::instance_count, flash_ck::instances};
    return &table;
}

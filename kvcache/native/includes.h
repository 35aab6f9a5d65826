// Headers that are not compiled for one instruction set: included before the target is named, so that functions of the
// standard library, which the linker merges over all files, stay runnable on every processor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "abi.h"
#include "graph_links.h"
#include "plan.h"
#include "scores_plan.h"
#include "scratch.h"
#include "threads.h"
#include "types.h"

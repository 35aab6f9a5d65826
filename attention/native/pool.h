// The bookkeeping of a bounded pool of pages, and the way from a file into it.
#pragma once

#include "abi.h"

namespace keysift {

void admit(const AdmitCall& call);

// 0, or the error number of the first piece that could not be read whole.
int read_pieces(const ReadCall& call);

}  // namespace keysift

/* Drives the first disk: prints its size and the text of its first sector, writes its second sector, and with the word
   "bulk" on the command line reads 3 MiB. */
#include "blk.h"

void guest_main(const char *command_line) {
    uint64_t device = begin_disk(command_line);
    report("sectors", get32(device + CONFIG));
    report("read status", transfer(READ, 0, SECTOR));
    data[SECTOR - 1] = 0;
    print("first=");
    print((char *)data);
    print("\r\n");
    memset(data, 0, SECTOR);
    memcpy(data, "written by the guest", 20);
    report("write status", transfer(WRITE, 1, SECTOR));
    if (has_word(command_line, "bulk")) {
        for (int i = 0; i < 3 * 1024 * 1024 / PIECE; i++)
            transfer(READ, (uint64_t)i * (PIECE / SECTOR), PIECE);
        print("bulk read\r\n");
    }
    for (;;)
        look_up();
}

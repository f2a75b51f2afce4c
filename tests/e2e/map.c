// Writes to a file through a shared mapping, once at the start and once for each SIGUSR1.
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

static volatile sig_atomic_t wanted = 1;

static void want(int number) {
    (void)number;
    wanted = 1;
}

int main(void) {
    int file = open("/mapped", O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, 4096) != 0) return 1;
    volatile char *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return 1;
    signal(SIGUSR1, want);
    for (;;) {
        if (wanted) {
            wanted = 0;
            memory[0]++;
        }
        usleep(10000);
    }
}

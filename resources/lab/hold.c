/*
 * Keeps one virtual machine with one vCPU, whose APIC is off, for as long as the lab lives.
 *
 * KVM patches its own and the scheduler's code when the first machine comes and the last one goes,
 * and when there is a vCPU with its APIC off or no longer one (static keys). An emulator whose CPUs
 * are threads may miss such a change in code that another CPU runs at that moment. With this
 * program nothing is patched any more, because there always is such a machine and such a vCPU.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define APIC_BASE_ENABLED (1 << 11)

static int call(int fd, unsigned long request, void *argument, const char *name)
{
    int result = ioctl(fd, request, argument);

    if (result < 0)
        err(1, "%s", name);
    return result;
}

int main(void)
{
    struct kvm_sregs sregs;
    int kvm = open("/dev/kvm", O_RDWR);
    int vm, vcpu;

    if (kvm < 0)
        err(1, "/dev/kvm");
    vm = call(kvm, KVM_CREATE_VM, 0, "KVM_CREATE_VM");
    call(vm, KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP");
    vcpu = call(vm, KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU");
    call(vcpu, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
    sregs.apic_base &= ~(unsigned long long)APIC_BASE_ENABLED;
    call(vcpu, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
    if (daemon(0, 0) < 0)
        err(1, "daemon");
    for (;;)
        pause();
}

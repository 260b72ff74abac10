//! A panic ends the VM with a status of its own and says on the serial port where it was.

use core::panic::PanicInfo;

use salp_protocol::exit;

use crate::call;
use crate::serial::print;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    print(format_args!("{info}"));
    call::exit(exit::PANIC)
}

//! What OpenSC in the guest makes of the card.

use anyhow::{Result, ensure};
use stack_tests::database::PIN;
use stack_tests::passthru::{Road, Stack};

#[tokio::test(flavor = "multi_thread")]
async fn first_look() -> Result<()> {
    let stack = Stack::start(Road::Unix, &["--trace"]).await?;
    for command in ["opensc-tool -n", "pkcs11-tool -L", &format!("pkcs11-tool -O --login --pin {PIN}"), &format!("pkcs11-tool --test --login --pin {PIN}"), "pkcs15-tool -D"] {
        let ran = stack.guest.run(command).await?;
        println!("$ {command}\n{}[{}]", ran.text(), ran.status);
    }
    println!("{}", stack.client.log());
    ensure!(false);
    Ok(())
}

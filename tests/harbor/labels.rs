//! Labels of Harbor on saved images: put there if the account may, and never a reason for a save to fail.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::refusals::rights_without;
use super::saves::{command, container};
use super::{Lab, Outcome, image, save as put};

/// The rights for labels, beside those of a save.
const FOR_LABELS: [(&str, &str); 3] = [
    ("label", "list"),
    ("label", "create"),
    ("artifact-label", "create"),
];

/// Returns the names of the labels of an image.
async fn labels_of(lab: &Lab, project: &str, tag: &str) -> BTreeSet<String> {
    let path = format!("/projects/{project}/repositories/x/artifacts/{tag}?with_label=true");
    let (status, artifact) = lab.ask("GET", &path, &Value::Null).await;
    assert_eq!(status, 200, "{artifact}");
    let labels = artifact["labels"].as_array().cloned().unwrap_or_default();
    let names = labels.iter().filter_map(|label| label["name"].as_str());
    names.map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn images_get_labels_of_their_project() -> Outcome {
    let lab = Lab::start().await?;
    let home = tempfile::tempdir()?;
    let Some(world) = container(home.path()) else {
        return lab.end().await;
    };
    let project = lab.project(None).await;
    let usual = rights_without(&[]);
    let all = [usual.as_slice(), &FOR_LABELS].concat();
    let able = lab.robot(&project, &all).await;
    let unable = lab.robot(&project, &usual).await;
    let save = async |who: &str, tag: &str| {
        let to = format!("{}/{project}/x:{tag}", lab.host);
        let mut command = command(&world, who, &to, tag);
        command.args(["--harbor-label=jupyter", "--harbor-label=gpu"]);
        let output = tokio::task::spawn_blocking(move || command.output()).await;
        let output = output.unwrap().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{text}");
        text
    };
    let wanted = BTreeSet::from(["gpu".to_owned(), "jupyter".to_owned()]);
    // The labels are created by the first save and found by the second.
    for tag in ["first", "second"] {
        let text = save(&able, tag).await;
        assert!(!text.contains("labels_missing"), "{text}");
        assert_eq!(labels_of(&lab, &project, tag).await, wanted, "{tag}");
    }
    world.work_on()?;
    let text = save(&unable, "third").await;
    assert!(text.contains("labels_missing"), "{text}");
    assert_eq!(labels_of(&lab, &project, "third").await, BTreeSet::new());
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_is_found_among_many_that_contain_its_name() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let id = lab.project_id(&project).await;
    let make = async |name: String| {
        let label = json!({"name": name, "scope": "p", "project_id": id});
        assert_eq!(lab.ask("POST", "/labels", &label).await.0, 201, "{name}");
    };
    make("cpu".to_owned()).await;
    // The newest come first, ten a page unless more are asked for, and at most 100.
    for n in 0..105 {
        make(format!("cpu-{n}")).await;
    }
    let destination = lab.to(&format!("{project}/x"));
    let image = image("labelled", 100);
    put(&destination, &image, "1").await?;
    let names = ["cpu".to_owned(), "gpu".to_owned()];
    destination.add_labels(&image.digest(), &names).await?;
    let wanted = BTreeSet::from(names);
    assert_eq!(labels_of(&lab, &project, "1").await, wanted);
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_that_cannot_be_put_does_not_keep_the_others_away() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let destination = lab.to(&format!("{project}/x"));
    let image = image("labelled too", 100);
    put(&destination, &image, "1").await?;
    // Harbor takes no label without a name.
    let names = [String::new(), "gpu".to_owned()];
    assert!(
        destination
            .add_labels(&image.digest(), &names)
            .await
            .is_err()
    );
    let wanted = BTreeSet::from(["gpu".to_owned()]);
    assert_eq!(labels_of(&lab, &project, "1").await, wanted);
    lab.end().await
}

# Workers read sources and write runs. The head does that, and starts and ends workers of its own
# cluster. Neither can touch another cluster, another bucket, or a role.

locals {
  region_arn = "arn:aws:ec2:${var.region}:*"
}

data "aws_iam_policy_document" "ec2" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "data" {
  statement {
    sid       = "ListBuckets"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"]
    resources = [for bucket in aws_s3_bucket.these : bucket.arn]
  }
  statement {
    sid       = "ReadSources"
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.these["sources"].arn}/*"]
  }
  statement {
    sid = "ReadAndWriteRuns"
    actions = [
      "s3:GetObject", "s3:PutObject", "s3:DeleteObject",
      "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts",
    ]
    resources = ["${aws_s3_bucket.these["runs"].arn}/runs/*"]
  }
}

data "aws_iam_policy_document" "head" {
  statement {
    sid       = "See"
    actions   = ["ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeImages", "ec2:DescribeSubnets", "ec2:DescribeSecurityGroups", "ec2:DescribeKeyPairs"]
    resources = ["*"] # these have no narrower resource
  }
  statement {
    sid     = "StartInOwnNetwork"
    actions = ["ec2:RunInstances"]
    resources = concat(
      ["arn:aws:ec2:${var.region}::image/${var.ami}"],
      [aws_security_group.nodes.arn],
      aws_subnet.private[*].arn,
      [for kind in ["key-pair", "network-interface", "volume", "spot-instances-request"] : "${local.region_arn}:${kind}/*"],
    )
  }
  statement {
    sid       = "StartOwnNodes"
    actions   = ["ec2:RunInstances"]
    resources = ["${local.region_arn}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    sid       = "TagWhatIsStarted"
    actions   = ["ec2:CreateTags"]
    resources = ["${local.region_arn}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }
  statement {
    sid       = "EndOwnNodes"
    actions   = ["ec2:TerminateInstances", "ec2:StopInstances", "ec2:CreateTags"]
    resources = ["${local.region_arn}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:ResourceTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    sid       = "GiveWorkersTheirRole"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.nodes["worker"].arn]
    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "nodes" {
  for_each           = toset(["head", "worker"])
  name               = "${var.name}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.ec2.json
}

resource "aws_iam_role_policy" "data" {
  for_each = aws_iam_role.nodes
  name     = "data"
  role     = each.value.id
  policy   = data.aws_iam_policy_document.data.json
}

resource "aws_iam_role_policy" "head" {
  name   = "workers"
  role   = aws_iam_role.nodes["head"].id
  policy = data.aws_iam_policy_document.head.json
}

# What Session Manager asks for: the only way to the head.
resource "aws_iam_role_policy_attachment" "sessions" {
  role       = aws_iam_role.nodes["head"].name
  policy_arn = "arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_instance_profile" "nodes" {
  for_each = aws_iam_role.nodes
  name     = each.value.name
  role     = each.value.name
}
